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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from grpo.learning.objective import Objective, objective
from grpo.learning.perturbation import jittered, perturbed
from grpo.learning.policy import Policy, PolicyOutput
from grpo.learning.update_report import (
    MicroBatchReport,
    UpdateTotals,
    report_of,
    total_of_micro_batches,
    total_of_ranks,
)
from grpo.losses import Loss
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
        """Puts the model under DeepSpeed.

        Args:
            model: the start of the policy, with float32 weights.
            config: the run's config.
            loss: what `config.algorithm.loss` names.
            reference: the model that the KL is measured to, or with `soft` the teacher. It is kept
                frozen, in the forward pass's dtype.
            soft: how the divergence from the teacher is measured.
        """
        deepspeed = join()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        settings = config.learner
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._algorithm = config.algorithm
        self._loss = loss
        self._soft = soft
        self._total_updates = config.total_updates
        self._router_coef = config.model.router_aux_coef
        _prepare_model(model, config.model, self.device)
        head: dict[str, Any] = {
            "temperature": 1.0 if soft else config.sampling.temperature,
            "chunk": settings.logits_chunk_tokens,
            "float32_head": config.model.float32_head,
        }
        self._reference: Policy | None = None
        if reference is not None:
            _freeze(reference, getattr(torch, config.model.dtype), self.device)
            self._reference = Policy(
                reference, ulysses=ulysses.shared(reference, settings.sequence_parallel), **head
            )
        policy = Policy(
            model,
            entropy_gradient=config.algorithm.entropy_coef != 0,
            router=self._router_coef > 0,
            teacher=self._reference if soft else None,
            soft=soft,
            ulysses=ulysses.shared(model, settings.sequence_parallel),
            **head,
        )
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameter_groups(policy, settings),
            config=deepspeed_config(settings, config.model.dtype),
        )
        self._policy: Policy = self._engine.module
        self._limit = NormLimit(self._engine.optimizer, settings.skip_grad_norm)
        # `share`: this rank's part of an update's micro-batches
        self.share, self._is_reporter = ranks.sequence_parallel_share(settings.sequence_parallel)
        self.updates = 0
        self._lost = 0  # updates in a row that were skipped
        self._reference_moved = False
        self._memory = FreedMemory()

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], *, reference: bool = False) -> list[Scores]:
        """Returns log-probabilities and entropies of each batch's completion tokens.

        The policy, or with `reference` the reference, scores them.
        """
        if not reference:
            return self._score(self._engine, batches)
        if self._reference is not None:
            return self._score(self._reference, batches)
        with lora.off(self._policy.model):
            return self._score(self._engine, batches)

    def _score(self, scorer: Any, batches: Sequence[Batch]) -> list[Scores]:
        outputs: list[PolicyOutput] = [scorer(to_device(batch, self.device)) for batch in batches]
        return [Scores(output.logprobs.cpu(), output.entropies.cpu()) for output in outputs]

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
        lr = self._set_learning_rate()
        num_tokens = self._num_tokens(batches)
        reports: list[MicroBatchReport] = []
        for done, batch in enumerate(batches, start=1):
            loss, report = self._loss_of(to_device(batch, self.device), num_tokens)
            # DeepSpeed takes the mean over ranks
            self._engine.backward(loss * ranks.world_size(), scale_wrt_gas=False)
            if self._counts(batch):
                reports.append(report)
            if on_batch is not None:
                on_batch(done, len(batches))
        totals = total_of_ranks(
            ranks.all_gather("the update's metrics", total_of_micro_batches(reports))
        )
        norm, applied = self._step()
        self.updates += 1
        self._memory.after_update()
        self._stop_after_lost_updates(totals.loss, norm, applied)
        metrics = _token_means(totals, num_tokens)
        metrics["policy/grad_norm"] = norm
        metrics["policy/lr"] = lr
        metrics["update/tokens"] = num_tokens
        metrics["update/micro_batches"] = len(batches)
        metrics["update/seconds"] = time.monotonic() - start
        metrics["update/not_finite"] = float(not applied)
        return metrics

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self._settings, self.updates, self._total_updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _counts(self, batch: Batch) -> bool:
        """Returns whether this rank reports a micro-batch: of the ranks that share it one does."""
        return self._is_reporter and not batch.idle

    def _num_tokens(self, batches: Sequence[Batch]) -> int:
        """Returns the completion tokens of an update on all ranks."""
        local = sum(int(batch.token_mask.sum()) for batch in batches if self._counts(batch))
        return sum(ranks.all_gather("the update's tokens", local))

    def _stop_after_lost_updates(self, loss: float, norm: float, applied: bool) -> None:
        """Raises RunError after MAX_LOST updates in a row that were skipped."""
        if applied and math.isfinite(loss):
            self._lost = 0
            return
        self._lost += 1
        if self._lost == MAX_LOST:
            raise not_finite(self.updates, loss, norm, self._settings)

    def _loss_of(self, batch: Batch, num_tokens: int) -> tuple[Tensor, MicroBatchReport]:
        """Returns a micro-batch's part of the update's loss [], and its report.

        `num_tokens`: the completion tokens of the whole update, on all ranks.
        """
        output: PolicyOutput = self._engine(batch)
        result = objective(output.logprobs, output.entropies, batch, self._algorithm, self._loss)
        if self._soft is not None:
            result = _with_distillation(result, output, self._soft)
        loss = (batch.token_weights * result.per_token).sum()
        if output.balance_loss is not None:
            num_batch_tokens = 0 if batch.idle else int(batch.token_mask.sum())
            share = num_batch_tokens / num_tokens
            loss = loss + self._router_coef * share * output.balance_loss
            result.metrics["router/balance"] = batch.token_mask * output.balance_loss
        return loss, report_of(loss, result, batch.token_mask)

    def _step(self) -> tuple[float, bool]:
        """Applies the gradient unless it is not finite or too large.

        Returns its norm before clipping, and whether it was applied.
        """
        if self._settings.zero_stage == 0:
            return self._step_without_zero()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if applied else self._limit.norm
        return norm, applied

    def _step_without_zero(self) -> tuple[float, bool]:
        """As `_step`: without ZeRO DeepSpeed reports no norm and skips no update."""
        gradients = [p.grad for p in self._policy.parameters() if p.grad is not None]
        if ranks.world_size() > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.SUM)
                gradient /= ranks.world_size()  # DeepSpeed takes the mean again, of equal ones
        norm = float(torch.nn.utils.get_total_norm(gradients))
        applied = norm <= self._settings.skip_grad_norm
        if applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm, applied

    def weights(self) -> LearnerWeights:
        """Returns every weight whole, under its Hugging Face name, in the forward pass's dtype.

        Buffers keep their own dtype. Tied weights come once, adapters are merged. Copy a tensor
        before going on: ZeRO-3 makes a bucket at a time whole. All ranks go through the weights
        together.
        """
        return LearnerWeights(self)

    def _layout(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        for bucket in self._buckets():
            for name, parameter in bucket:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                for hub_name, weight in moe.hub_weights(self._policy.model, name, empty):
                    yield hub_name, weight.dtype, tuple(weight.shape)
        for name, buffer in self._saved_buffers():
            yield name, buffer.dtype, tuple(buffer.shape)

    def _saved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the buffers that are part of a checkpoint, such as DeepSeek's router bias."""
        saved = self._policy.model.state_dict().keys()
        for name, buffer in self._policy.model.named_buffers():
            if name in saved:
                yield name, buffer

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        adapted_layers = lora.of(self._policy.model)
        for bucket in self._buckets():
            with self._whole(*(parameter for _, parameter in bucket)):
                for name, parameter in bucket:
                    weight = parameter.data
                    if name in adapted_layers:
                        weight = lora.merged(weight, adapted_layers[name])
                    yield from moe.hub_weights(self._policy.model, name, weight)
        yield from self._saved_buffers()

    def _buckets(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Returns the model's weights by name, adapters aside, in parts of about BUCKET bytes."""
        buckets: list[list[tuple[str, nn.Parameter]]] = [[]]
        bucket_bytes = 0
        for name, parameter in self._policy.model.named_parameters():
            if "lora_" in name:
                continue
            num_weights = getattr(parameter, "ds_numel", parameter.numel())
            num_bytes = num_weights * parameter.itemsize
            if bucket_bytes and bucket_bytes + num_bytes > BUCKET:
                buckets.append([])
                bucket_bytes = 0
            buckets[-1].append((name.replace(".base_layer.", "."), parameter))
            bucket_bytes += num_bytes
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
        if parts in (0, ranks.world_size()):
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
        universal = directory.with_name(f".{directory.name}.universal.partial")
        ranks.rank0_first(
            "the universal checkpoint",
            lambda: _write_universal(directory, universal) if ranks.rank() == 0 else None,
        )
        self._engine._config.load_universal_checkpoint = True
        groups = self._engine.optimizer.param_groups
        weight_decays = [group["weight_decay"] for group in groups]
        try:
            path_and_state: tuple[Any, Any] = self._engine.load_checkpoint(
                str(universal), tag="learner"
            )
            # Under ZeRO-3 DeepSpeed gives all groups the first one's weight decay ...
            for group, weight_decay in zip(groups, weight_decays, strict=True):
                group["weight_decay"] = weight_decay
            # ... and all parameters one counter of steps.
            for state in self._inner_optimizer().state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()
            return path_and_state
        finally:
            self._engine._config.load_universal_checkpoint = False
            ranks.all_gather("the loaded checkpoint", None)
            if ranks.rank() == 0:
                shutil.rmtree(universal, ignore_errors=True)

    def _inner_optimizer(self) -> Any:
        """Returns torch's optimizer, which ZeRO's optimizers wrap."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    @torch.no_grad()
    def reset_reference(self, *, optimizer: bool) -> None:
        """Makes the policy as it is the reference; `optimizer`: forgets Adam's moments too."""
        assert self._reference is not None
        for parameter, reference in zip(
            self._policy.model.parameters(), self._reference.model.parameters(), strict=True
        ):
            with self._whole(parameter):
                reference.copy_(parameter)
        self._reference_moved = True
        if optimizer:
            self._reset_optimizer()

    def _reset_optimizer(self) -> None:
        inner = self._inner_optimizer()
        for state in inner.state.values():
            for key, value in state.items():
                # DeepSpeed's own Adam counts steps in an int
                state[key] = value.zero_() if isinstance(value, Tensor) else 0
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = 0


class Scores(NamedTuple):
    """What the learner says of a micro-batch's completion tokens, on the CPU; 0 elsewhere."""

    logprobs: Tensor  # [B, T] float32
    entropies: Tensor  # [B, T] float32


def _prepare_model(model: Any, settings: configs.Model, device: torch.device) -> None:
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    moe.check(model, settings.router_aux_coef, settings.freeze_router)
    model.train()
    if device.type == "cuda":
        models.use_fused_norms(model)


def _freeze(reference: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a model a reference, in place."""
    # buffers (rotary frequencies) stay in float32, as DeepSpeed leaves the policy's
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype)
    reference.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        models.use_fused_norms(reference)


def _write_universal(directory: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(directory / "learner"),
            output_folder=str(universal / "learner"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def _token_means(totals: UpdateTotals, num_tokens: int) -> dict[str, float]:
    """Returns an update's metrics that are means over its completion tokens.

    Source: the effective share of samples is PipelineRL 2509.19128, (sum w)^2 / (n sum w^2).
    """
    means = {name: total / num_tokens for name, total in totals.metrics.items()}
    means["loss"] = totals.loss
    means["mismatch/max_weight"] = totals.max_ratio
    means["mismatch/effective"] = totals.ratio_sum**2 / (totals.ratio_squared_sum * num_tokens)
    return means


def _with_distillation(result: Objective, output: PolicyOutput, soft: Soft) -> Objective:
    """Returns the objective with the divergence from the teacher, and the hidden states' error.

    Source: Hinton 1503.02531: the divergence counts T^2 times.
    """
    per_token = result.per_token
    metrics = dict(result.metrics)
    if output.divergences is not None:
        per_token = per_token + soft.soft_weight * soft.temperature**2 * output.divergences
        metrics["policy/divergence"] = output.divergences
    if output.hidden_errors is not None:
        per_token = per_token + soft.hidden_weight * output.hidden_errors
        metrics["policy/hidden"] = output.hidden_errors
    return replace(result, per_token=per_token, metrics=metrics)


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
