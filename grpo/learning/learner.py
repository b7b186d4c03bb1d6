"""The learner: a policy under DeepSpeed.

It knows batches, a per-token loss and weights; nothing of problems, rewards or engines.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo import config as configs
from grpo.learning import lora, models, moe, ulysses
from grpo.learning.batch import to_device
from grpo.learning.deepspeed_setup import (
    MAX_LOST,
    FreedMemory,
    NormLimit,
    deepspeed_config,
    join,
    learning_rate,
    not_finite,
    parameter_groups,
)
from grpo.learning.perturbation import jittered, perturbed
from grpo.learning.policy import Policy
from grpo.learning.reports import summed
from grpo.losses._objective import Loss, objective
from grpo.run import ranks
from grpo.types import Batch, RunError

if TYPE_CHECKING:
    from grpo.config import DistillConfig, Soft


BUCKET = 2**28  # bytes of weights that ZeRO-3 makes whole at once for the engine
JITTER_SEEDS = 50_000_000  # the seeds from here on are not those of perturbations


class Learner:
    """Scores and updates a policy.

    State: weights, optimizer, and `updates`, the number of optimizer updates made.
    """

    def __init__(
        self,
        model: nn.Module,
        config: configs.Config | DistillConfig,
        loss: Loss,
        reference: nn.Module | None = None,
        soft: Soft | None = None,
    ) -> None:
        """`model` has float32 weights.

        `reference`, for KL, is kept frozen in the forward pass's dtype; with `soft` it is the
        teacher.
        """
        deepspeed = join()
        settings = config.learner
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )  # type: ignore[operator]
        moe.check(model, config.model.router_aux_coef, config.model.freeze_router)
        model.train()
        self._settings, self._algorithm, self._loss = settings, config.algorithm, loss
        self._total_updates = config.total_updates
        self._dtype, self._router_coef = (
            getattr(torch, config.model.dtype),
            config.model.router_aux_coef,
        )
        head: dict[str, Any] = {
            "temperature": 1.0 if soft else config.sampling.temperature,
            "chunk": settings.logits_chunk_tokens,
            "float32_head": config.model.float32_head,
        }
        self._reference: Policy | None = None
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        if self.device.type == "cuda":
            models.use_fused_norms(model)
        if reference is not None:
            # buffers (rotary frequencies) stay in float32, as DeepSpeed leaves the policy's
            for parameter in reference.parameters():
                parameter.data = parameter.data.to(self._dtype)
            reference = reference.to(self.device).eval().requires_grad_(False)
            if self.device.type == "cuda":
                models.use_fused_norms(reference)
            self._reference = Policy(
                reference, ulysses=ulysses.shared(reference, settings.sequence_parallel), **head
            )
        self._soft = soft
        policy = Policy(
            model,
            entropy_gradient=config.algorithm.entropy_coef != 0,
            router=self._router_coef > 0,
            teacher=self._reference if soft else None,
            soft=soft,
            ulysses=ulysses.shared(model, settings.sequence_parallel),
            **head,
        )
        ds_config = deepspeed_config(settings, config.model.dtype)
        self._engine, *_ = deepspeed.initialize(
            model=policy, model_parameters=parameter_groups(policy, settings), config=ds_config
        )
        self._policy: Policy = self._engine.module
        self._limit = NormLimit(self._engine.optimizer, settings.skip_grad_norm)
        # of an update's micro-batches
        self.share, self._tells = ranks.share(settings.sequence_parallel)
        self.updates = 0
        self._lost = 0  # updates in a row that were skipped
        self._reference_moved = False
        self._memory = FreedMemory()

    @torch.no_grad()
    def score(
        self, batches: Sequence[Batch], *, reference: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns logprobs and entropies [B, T] of each batch's completion tokens.

        The policy, or with `reference` the reference, scores them. Both are float32, on the CPU.
        """
        with (
            lora.off(self._policy.model)
            if reference and self._reference is None
            else contextlib.nullcontext()
        ):
            scorer = self._reference if reference and self._reference is not None else self._engine
            scored = [scorer(to_device(batch, self.device)) for batch in batches]
        return [(logprobs.cpu(), entropies.cpu()) for logprobs, entropies in scored]

    def update(
        self, batches: Sequence[Batch], on_batch: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Makes one optimizer update with the gradient summed over micro-batches.

        Returns its metrics.

        The token weights already hold the reduction, so DeepSpeed divides by nothing.
        `on_batch(done, total)` is called after each micro-batch and may raise: nothing of the
        update has been applied then.
        """
        start = time.monotonic()
        lr = learning_rate(self._settings, self.updates, self._total_updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # of each micro-batch, on the device: to read a value waits for all that runs there
        reports: list[dict[str, Tensor]] = []
        own = sum(
            int(batch.token_mask.sum()) for batch in batches if not batch.idle and self._tells
        )
        tokens = sum(ranks.gather("the update's tokens", own))
        for done, batch in enumerate(batches, start=1):
            loss, report = self._loss_of(to_device(batch, self.device), tokens)
            # DeepSpeed takes the mean over ranks
            self._engine.backward(loss * ranks.count(), scale_wrt_gas=False)
            if self._tells and not batch.idle:
                reports.append(
                    {name: value.sum() for name, value in report.items()}
                    | {"loss": loss.detach(), "_highest": report["_rho"].max()}
                )
            if on_batch is not None:
                on_batch(done, len(batches))
        sums, highest = summed(reports)
        found = ranks.gather("the update's metrics", (sums, highest))
        sums = {
            name: sum(one.get(name, 0.0) for one, _ in found)
            for name in max((one for one, _ in found), key=len)
        }
        norm, applied = self._step()
        self.updates += 1
        self._memory.after_update()
        self._lost = 0 if applied and math.isfinite(sums["loss"]) else self._lost + 1
        if self._lost == MAX_LOST:
            raise not_finite(self.updates, sums["loss"], norm, self._settings)
        loss_value, rho, squared = sums.pop("loss"), sums.pop("_rho"), sums.pop("_rho_squared")
        return {name: value / tokens for name, value in sums.items()} | {
            "loss": loss_value,
            "policy/grad_norm": norm,
            "policy/lr": lr,
            "mismatch/max_weight": max(most for _, most in found),
            # PipelineRL 2509.19128: (sum w)^2 / (n sum w^2)
            "mismatch/effective": rho**2 / (squared * tokens),
            "update/tokens": tokens,
            "update/micro_batches": len(batches),
            "update/seconds": time.monotonic() - start,
            "update/not_finite": float(not applied),
        }

    def _loss_of(self, batch: Batch, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns a micro-batch's part of the update's loss, and a report.

        The report holds quantities of the micro-batch's completion tokens, by name.
        """
        logprobs, entropies = self._engine(batch)
        per_token, report = objective(logprobs, entropies, batch, self._algorithm, self._loss)
        if self._soft is not None and self._policy.divergences is not None:
            per_token = (
                per_token
                + self._soft.soft_weight * self._soft.temperature**2 * self._policy.divergences
            )
            report["policy/divergence"] = self._policy.divergences
            if self._policy.hidden_errors is not None:
                per_token = per_token + self._soft.hidden_weight * self._policy.hidden_errors
                report["policy/hidden"] = self._policy.hidden_errors
        loss = (batch.token_weights * per_token).sum()
        mask = batch.token_mask
        if self._router_coef:
            share = 0.0 if batch.idle else int(mask.sum()) / tokens
            loss = loss + self._router_coef * share * self._policy.balance_loss
            report["router/balance"] = mask * self._policy.balance_loss
        report["_rho_squared"] = report["_rho"].square()
        return loss, {
            name: value.detach()[mask] if value.shape == mask.shape else value.detach()
            for name, value in report.items()
        }

    def _step(self) -> tuple[float, bool]:
        """Applies the gradient unless it is not finite or too large.

        Returns its norm before clipping, and whether it was applied.
        """
        # DeepSpeed tells no norm without ZeRO, and looks at nothing
        if self._settings.zero_stage == 0:
            gradients = [p.grad for p in self._policy.parameters() if p.grad is not None]
            for gradient in gradients if ranks.count() > 1 else ():
                torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.SUM)
                gradient /= ranks.count()  # DeepSpeed takes the mean again, of equal ones
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if applied := norm <= self._settings.skip_grad_norm:
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm, applied
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return float(self._engine.get_global_grad_norm()) if applied else self._limit.norm, applied

    def weights(self) -> LearnerWeights:
        """Returns every weight whole, under its Hugging Face name, in the forward pass's dtype.

        Buffers keep their own dtype. Tied weights come once, adapters are merged. Copy a tensor
        before going on: ZeRO-3 makes a bucket at a time whole. All ranks go through the weights
        together.
        """
        return LearnerWeights(self)

    def _layout(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        for name, parameter in (one for bucket in self._buckets() for one in bucket):
            shaped = torch.empty(
                getattr(parameter, "ds_shape", parameter.shape),
                dtype=parameter.dtype,
                device="meta",
            )
            yield from (
                (n, weight.dtype, tuple(weight.shape))
                for n, weight in moe.hub_weights(self._policy.model, name, shaped)
            )
        yield from (
            (name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self._own_buffers()
        )

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self._policy.model.state_dict().keys()
        # DeepSeek's router bias
        return (
            (name, buffer) for name, buffer in self._policy.model.named_buffers() if name in kept
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        adapted = lora.of(self._policy.model)
        for bucket in self._buckets():
            with self._whole(*(parameter for _, parameter in bucket)):
                for name, parameter in bucket:
                    layer = adapted.get(name)
                    weight = lora.merged(parameter.data, layer) if layer else parameter.data
                    yield from moe.hub_weights(self._policy.model, name, weight)
        yield from self._own_buffers()

    def _buckets(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Returns the model's weights by name, adapters aside, in parts of about BUCKET bytes."""
        buckets: list[list[tuple[str, nn.Parameter]]] = [[]]
        held = 0
        for name, parameter in self._policy.model.named_parameters():
            if "lora_" not in name:
                size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.itemsize
                if held and held + size > BUCKET:
                    buckets, held = [*buckets, []], 0
                buckets[-1].append((name.replace(".base_layer.", "."), parameter))
                held += size
        return buckets

    @contextlib.contextmanager
    def perturbed(self, seed: int, *, jitter: bool = False) -> Iterator[None]:
        """Perturbs every weight within the context and restores it bit for bit afterwards.

        The seeded perturbation is visible: it scales a weight by about 20 % and adds noise of 10 %.
        With `jitter` the weights of the same perturbation are `jittered`.

        Under ZeRO-3 each rank perturbs its own part of a weight, and keeps no more than that.
        """
        split = self._settings.zero_stage == 3
        kept: list[tuple[Tensor, Tensor]] = []
        # what ZeRO-3 still holds whole would not follow its parts
        self._engine.empty_partition_cache()
        try:
            with torch.no_grad():
                for i, parameter in enumerate(self._policy.model.parameters()):
                    held = parameter.ds_tensor if split else parameter.data
                    kept.append((held, held.clone()))
                    number = seed + i + (100_000 * ranks.rank() if split else 0)
                    held.copy_(perturbed(held, number))
                    if jitter:
                        held.copy_(jittered(held, JITTER_SEEDS + number))
            yield
        finally:
            self._engine.empty_partition_cache()
            with torch.no_grad():
                for held, before in kept:
                    held.copy_(before)

    def _whole(self, *parameters: nn.Parameter) -> Any:
        """ZeRO-3 keeps parts of a parameter on each rank; within this context they are whole."""
        if self._settings.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def save(self, directory: Path) -> None:
        """Writes weights, optimizer state and the update counter.

        It also writes the reference once that is no longer the start model.
        """
        self._engine.save_checkpoint(
            str(directory), tag="learner", client_state={"updates": self.updates}, save_latest=False
        )
        if self._reference_moved and self._reference is not None and ranks.rank() == 0:
            torch.save(self._reference.model.state_dict(), directory / "reference.pt")

    def save_adapter(self, directory: Path) -> None:
        """Writes the policy's LoRA adapter to `directory`."""
        lora.save(self._policy.model, directory)

    def load(self, directory: Path) -> None:
        """Loads what `save` wrote on as many ranks, or on another number of them.

        Raises RunError.
        """
        # none without ZeRO: whole
        parts = len(list((directory / "learner").glob("*zero_pp_rank_*_optim_states.pt")))
        if parts in (0, ranks.count()):
            path, state = self._engine.load_checkpoint(str(directory), tag="learner")
        else:
            path, state = self._load_universal(directory)
        if path is None:
            raise RunError(f"{directory}: DeepSpeed found no checkpoint to load")
        self.updates = state["updates"]
        if (directory / "reference.pt").exists() and self._reference is not None:
            self._reference.model.load_state_dict(
                torch.load(directory / "reference.pt", map_location=self.device)
            )
            self._reference_moved = True

    def _load_universal(self, directory: Path) -> tuple[Any, Any]:
        """Loads a checkpoint of another number of ranks.

        DeepSpeed's universal form of it is made beside it and removed again.
        """
        from deepspeed.checkpoint import ds_to_universal

        whole = directory.with_name(f".{directory.name}.universal.partial")
        few = argparse.Namespace(
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        few.input_folder, few.output_folder = str(directory / "learner"), str(whole / "learner")
        ranks.first(
            "the universal checkpoint",
            lambda: ds_to_universal.main(few) if ranks.rank() == 0 else None,
        )
        self._engine._config.load_universal_checkpoint = True
        groups = self._engine.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        try:
            found: tuple[Any, Any] = self._engine.load_checkpoint(str(whole), tag="learner")
            # under ZeRO-3 all get the first one's ...
            for group, decay in zip(groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in getattr(
                self._engine.optimizer, "optimizer", self._engine.optimizer
            ).state.values():
                # ... and share one counter
                state |= (
                    {"step": state["step"].clone()} if isinstance(state.get("step"), Tensor) else {}
                )
            return found
        finally:
            self._engine._config.load_universal_checkpoint = False
            ranks.gather("the loaded checkpoint", None)
            if ranks.rank() == 0:
                shutil.rmtree(whole, ignore_errors=True)

    @torch.no_grad()
    def reset_reference(self, *, optimizer: bool) -> None:
        """Makes the policy as it is the reference; `optimizer`: forgets Adam's moments too."""
        assert self._reference is not None
        for own, theirs in zip(
            self._policy.model.parameters(), self._reference.model.parameters(), strict=True
        ):
            with self._whole(own):
                theirs.copy_(own)
        self._reference_moved = True
        if optimizer:
            inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
            for state in inner.state.values():
                for key, value in state.items():
                    # DeepSpeed's own Adam counts steps in an int
                    state[key] = value.zero_() if isinstance(value, Tensor) else 0
            for group in inner.param_groups:
                group |= {"step": 0} if "step" in group else {}


class LearnerWeights:
    """A `Weights` (grpo/engines): `for name, tensor in weights`, `weights.layout()`."""

    def __init__(self, learner: Learner) -> None:
        """`learner`: the learner whose weights each iteration reads."""
        self._learner = learner

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight, as `Learner.weights` describes."""
        return self._learner._weights()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Returns `(name, dtype, shape)` of every weight, without making any whole."""
        return list(self._learner._layout())
