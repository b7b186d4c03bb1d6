"""The learner: a policy that DeepSpeed trains.

It depends on batches, a per-token loss and weights only, not on problems, rewards or engines.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo import config as configs
from grpo.learning import lora, models, moe, packing, ulysses
from grpo.learning.batch import to_device
from grpo.learning.deepspeed_setup import (
    MAX_SKIPPED_UPDATES,
    HeapReuse,
    NormLimit,
    deepspeed_config,
    free_deepspeed_engine,
    init_deepspeed,
    learning_rate,
    parameter_groups,
    skipped_updates_error,
    torch_optimizer,
)
from grpo.learning.divergence import Vocabularies
from grpo.learning.learner_checkpoint import load_checkpoint, save_checkpoint
from grpo.learning.learner_weights import LearnerWeights, gathered
from grpo.learning.objective import Objective, objective
from grpo.learning.perturbation import jittered, perturbed
from grpo.learning.policy import HeadOptions, Policy, PolicyOutput, Reference, SoftTargets
from grpo.learning.update_report import (
    MicroBatchReport,
    UpdateTotals,
    report_micro_batch,
    sum_micro_batches,
    sum_totals,
)
from grpo.losses import Loss
from grpo.run import ranks
from grpo.types import Batch

if TYPE_CHECKING:
    from grpo.config import DistillConfig, SftConfig, SoftTargetSettings, TrainConfig

    # The configs of the stages that train with a Learner.
    LearnerConfig = TrainConfig | DistillConfig | SftConfig

RANK_SEED_OFFSET = 100_000  # times the rank: keeps the seeds of `Learner.perturbed` distinct


class Scores(NamedTuple):
    """The values of a micro-batch's completion tokens, on the CPU; 0 at all other positions.

    Attributes:
        logprobs: [B, T] float32.
        entropies: [B, T] float32.
    """

    logprobs: Tensor
    entropies: Tensor


class _StepResult(NamedTuple):
    """The result of an optimizer step."""

    grad_norm: float  # before clipping
    is_applied: bool


class Learner:
    """Scores and updates a policy.

    Attributes:
        num_updates: Number of optimizer updates so far, including skipped ones.
        micro_batch_share: `(index, count)`: this rank computes part `index` of `count` parts of an
            update's micro-batches.
        device: The device of the policy.
        attention: The name of the policy's attention.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        loss: Loss,
        references: Mapping[str, Reference] | None = None,
        *,
        soft: SoftTargetSettings | None = None,
    ) -> None:
        """Prepares a model for training and passes it to DeepSpeed.

        Args:
            model: The initial policy, with float32 weights.
            config: The config of the run.
            loss: The loss that `config.algorithm.loss` names.
            references: The frozen models by name: "" for the reference model of the KL or
                `model.teacher`, and the names of `model.teachers`. They are converted to the dtype
                of the forward pass.
            soft: The config section `soft`. If set, the divergence from the teacher is part of the
                loss. In `grpo train`, `config.algorithm` determines this.
        """
        deepspeed = init_deepspeed()
        settings = config.learner
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.device = _current_device()
        self.micro_batch_share, self._is_reporter = ranks.sequence_parallel_share(
            settings.sequence_parallel
        )
        self.num_updates = 0
        self._settings = settings
        self._algorithm = config.algorithm
        self._loss = loss
        self._distillation = _distillation_weights(config, soft)
        self._total_updates = config.total_updates
        self._router_coef = config.model.router_aux_coef
        self._num_consecutive_skips = 0
        self._is_reference_changed = False
        _prepare_policy_model(model, config.model, self.device)
        dtype = getattr(torch, config.model.dtype)
        self.attention = packing.describe_attention(model.config, dtype, self.device)
        self._references: dict[str, Policy] = {}
        for name, reference in (references or {}).items():
            self._references[name] = _reference_policy(reference.model, config, self.device)
        soft_targets = _soft_targets(config, soft, self._references)
        if soft_targets is not None:
            vocabularies = _vocabularies(references or {}, model)
            soft_targets = replace(soft_targets, vocabularies=vocabularies)
        policy = _trained_policy(model, config, soft_targets)
        # DeepSpeed's engine. It has nothing to do with the vLLM engine that samples.
        self._deepspeed_engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameter_groups(policy, settings),
            config=deepspeed_config(settings, config.model.dtype),
        )
        self._policy: Policy = self._deepspeed_engine.module
        self._norm_limit = NormLimit(self._deepspeed_engine.optimizer, settings.skip_grad_norm)
        self._heap = HeapReuse()

    def close(self) -> None:
        """Makes the memory of the learner collectable. It cannot be used afterwards."""
        free_deepspeed_engine(self._deepspeed_engine)

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], *, reference: bool = False) -> list[Scores]:
        """Returns log-probabilities and entropies of the completion tokens of each batch.

        With `reference`, they are those of the batch's teacher or of the reference model (with
        LoRA, of the policy without its adapters), otherwise those of the policy.
        """
        return [self._score(batch, reference=reference) for batch in batches]

    def _score(self, batch: Batch, *, reference: bool) -> Scores:
        model: Any = self._deepspeed_engine
        without_adapters: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if reference:
            model = self._references.get(batch.teacher, self._references.get(""))
        if model is None:
            model = self._deepspeed_engine
            without_adapters = lora.adapters_disabled(self._policy.model)
        with without_adapters:
            output: PolicyOutput = model(to_device(batch, self.device))
        return Scores(output.logprobs.cpu(), output.entropies.cpu())

    def update(
        self, batches: Sequence[Batch], on_batch: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Makes one optimizer update with the gradients of all micro-batches.

        The gradients are summed, not averaged: the token weights of the batches contain the
        reduction.

        Args:
            batches: This rank's micro-batches of the update.
            on_batch: Called as `on_batch(num_done, num_batches)` after each micro-batch. If it
                raises, the update is not applied.

        Returns:
            The metrics of the update, e.g. `{"loss": 0.02, "policy/entropy": 0.31,
            "policy/grad_norm": 0.4, "update/tokens": 5120}`.

        Raises:
            RunError: MAX_SKIPPED_UPDATES consecutive updates were skipped, or had a loss that is
                not finite.
            UserError: The loss does not return a LossOutput.
        """
        start = time.monotonic()
        lr = self._set_learning_rate()
        num_tokens = self._num_tokens(batches)
        num_selected = self._num_selected(batches) if self._router_coef else None
        reports: list[MicroBatchReport] = []
        for num_done, batch in enumerate(batches, start=1):
            loss, report = self._micro_batch_loss(
                to_device(batch, self.device), num_tokens, num_selected
            )
            # DeepSpeed averages the gradients over ranks, but they have to be summed.
            self._deepspeed_engine.backward(loss * ranks.world_size(), scale_wrt_gas=False)
            if self._is_reported(batch):
                reports.append(report)
            if on_batch is not None:
                on_batch(num_done, len(batches))
        totals_of_ranks = ranks.all_gather("the update's metrics", sum_micro_batches(reports))
        totals = sum_totals(totals_of_ranks)
        step = self._step()
        self.num_updates += 1
        self._heap.after_update()
        self._stop_after_skipped_updates(totals.loss, step)
        metrics = _token_metrics(totals, num_tokens)
        metrics["policy/grad_norm"] = step.grad_norm
        metrics["policy/lr"] = lr
        metrics["update/tokens"] = num_tokens
        metrics["update/micro_batches"] = len(batches)
        metrics["update/seconds"] = time.monotonic() - start
        metrics["update/not_finite"] = float(not step.is_applied)
        return metrics

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self._settings, self.num_updates, self._total_updates)
        for group in self._deepspeed_engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _is_reported(self, batch: Batch) -> bool:
        """Returns whether this rank reports a micro-batch, so that each one is counted once.

        Of the ranks that share a micro-batch, one reports it. A filler repeats a micro-batch of
        another rank with weight 0.
        """
        return self._is_reporter and not batch.is_filler

    def _num_tokens(self, batches: Sequence[Batch]) -> int:
        """Returns the number of completion tokens of an update, on all ranks."""
        num_local = sum(
            int(batch.token_mask.sum()) for batch in batches if self._is_reported(batch)
        )
        return sum(ranks.all_gather("the update's tokens", num_local))

    @torch.no_grad()
    def _num_selected(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the number of an update's tokens that each expert processes, on all ranks, [E].

        It takes a forward pass of every micro-batch: the balance loss of the first one already
        depends on the load of all.
        """
        local: list[list[float]] = []  # [E] of each micro-batch
        for batch in batches:
            output: PolicyOutput = self._deepspeed_engine(to_device(batch, self.device))
            assert output.num_selected is not None
            if self._is_reported(batch):
                local.append(output.num_selected.tolist())
        rows: list[list[float]] = []
        for rows_of_rank in ranks.all_gather("the update's expert load", local):
            rows += rows_of_rank
        return torch.tensor(rows, device=self.device).sum(0)

    def _micro_batch_loss(
        self, batch: Batch, num_update_tokens: int, num_selected: Tensor | None
    ) -> tuple[Tensor, MicroBatchReport]:
        """Returns a micro-batch's part of the update's loss [], and its report.

        Args:
            batch: The micro-batch.
            num_update_tokens: The number of completion tokens of the update, on all ranks.
            num_selected: The result of `_num_selected`. None without a balance loss.
        """
        output: PolicyOutput = self._deepspeed_engine(batch)
        result = objective(output.logprobs, output.entropies, batch, self._algorithm, self._loss)
        if self._distillation is not None:
            result = _with_distillation(result, output, self._distillation)
        loss = (batch.token_weights * result.per_token).sum()
        if num_selected is not None:
            assert output.expert_probabilities is not None
            balance = moe.balance_loss(
                self._policy.model, output.expert_probabilities, num_selected
            )
            if batch.is_filler:
                balance = 0 * balance
            loss = loss + self._router_coef * balance
            # A metric is a mean over tokens. The factor makes this one the sum of the parts.
            num_batch_tokens = batch.token_mask.sum()
            result.metrics["router/balance"] = (
                batch.token_mask * balance * num_update_tokens / num_batch_tokens
            )
        return loss, report_micro_batch(loss, result, batch.token_mask)

    def _step(self) -> _StepResult:
        """Applies the gradient unless its norm is not finite or too large."""
        if self._settings.zero_stage == 0:
            return self._step_without_zero()
        self._deepspeed_engine.step()
        is_applied = bool(self._deepspeed_engine.was_step_applied())
        if is_applied:
            grad_norm = float(self._deepspeed_engine.get_global_grad_norm())
        else:
            grad_norm = self._norm_limit.norm
        return _StepResult(grad_norm, is_applied)

    def _step_without_zero(self) -> _StepResult:
        """Implements `_step` without ZeRO: DeepSpeed then reports no norm and skips no update."""
        gradients = [
            parameter.grad for parameter in self._policy.parameters() if parameter.grad is not None
        ]
        if ranks.world_size() > 1:
            # The norm needs the averages over ranks. DeepSpeed's step() averages them again, which
            # has no effect, because they are then equal on all ranks.
            for gradient in gradients:
                torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.SUM)
                gradient /= ranks.world_size()
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        is_applied = grad_norm <= self._settings.skip_grad_norm
        if is_applied:
            self._deepspeed_engine.step()
        else:
            self._deepspeed_engine.zero_grad()
        return _StepResult(grad_norm, is_applied)

    def _stop_after_skipped_updates(self, loss: float, step: _StepResult) -> None:
        """Raises RunError after MAX_SKIPPED_UPDATES consecutive updates that failed.

        An update has failed if it was skipped or its loss is not finite.
        """
        if step.is_applied and math.isfinite(loss):
            self._num_consecutive_skips = 0
            return
        self._num_consecutive_skips += 1
        if self._num_consecutive_skips == MAX_SKIPPED_UPDATES:
            raise skipped_updates_error(
                self.num_updates, loss, step.grad_norm, self._settings, MAX_SKIPPED_UPDATES
            )

    @torch.no_grad()
    def merged_share(self) -> float | None:
        """Returns the share of the adapters' change that `weights` has (`lora.merged_share`)."""
        return lora.merged_share(self._policy.model)

    def weights(self) -> LearnerWeights:
        """Returns the policy's weights. All ranks must iterate over them together."""
        return LearnerWeights(self._policy.model, self._settings.zero_stage)

    @contextlib.contextmanager
    def perturbed(self, seed: int | None, *, jitter_seed: int | None = None) -> Iterator[None]:
        """Changes every weight within the context and restores it bit for bit afterwards.

        The changes are those of grpo/learning/perturbation.py. They depend on the seeds, and with
        ZeRO-3 on the number of ranks: each rank changes and restores its own part of a weight.

        Args:
            seed: The seed of `perturbation.perturbed`. None: the weights are not perturbed.
            jitter_seed: The seed of `perturbation.jittered`, which changes the weights afterwards.
                None: they are not jittered.
        """
        originals: list[tuple[Tensor, Tensor]] = []  # (storage, copy of its values)
        # Parameters that ZeRO-3 still holds complete would keep their old values.
        self._deepspeed_engine.empty_partition_cache()
        try:
            with torch.no_grad():
                for index, parameter in enumerate(self._policy.model.parameters()):
                    weight = self._local_weight(parameter)
                    originals.append((weight, weight.clone()))
                    if seed is not None:
                        weight.copy_(perturbed(weight, self._weight_seed(seed, index)))
                    if jitter_seed is not None:
                        weight.copy_(jittered(weight, self._weight_seed(jitter_seed, index)))
            yield
        finally:
            self._deepspeed_engine.empty_partition_cache()
            with torch.no_grad():
                for weight, original in originals:
                    weight.copy_(original)

    def _local_weight(self, parameter: Any) -> Tensor:
        """Returns the part of a parameter that this rank stores: all of it without ZeRO-3."""
        is_split = self._settings.zero_stage == 3
        weight: Tensor = parameter.ds_tensor if is_split else parameter.data
        return weight

    def _weight_seed(self, seed: int, index: int) -> int:
        """Returns the seed of the parameter at an index. With ZeRO-3 it differs between ranks."""
        if self._settings.zero_stage == 3:
            return seed + index + RANK_SEED_OFFSET * ranks.rank()
        return seed + index

    def save(self, directory: Path) -> None:
        """Writes weights, optimizer state and the number of updates. All ranks must call it.

        The reference is written only if `reset_reference` has changed it.
        """
        save_checkpoint(self._deepspeed_engine, directory, {"updates": self.num_updates})
        if self._is_reference_changed and ranks.rank() == 0:
            torch.save(self._references[""].model.state_dict(), directory / "reference.pt")

    def save_adapter(self, directory: Path) -> None:
        """Writes the policy's LoRA adapter."""
        lora.save_adapter(self._policy.model, directory)

    def load(self, directory: Path) -> None:
        """Loads a checkpoint of `save`, which any number of ranks may have written.

        Raises:
            RunError: The directory has no checkpoint.
        """
        client_state = load_checkpoint(self._deepspeed_engine, directory)
        self.num_updates = client_state["updates"]
        reference_file = directory / "reference.pt"
        if reference_file.exists() and "" in self._references:
            state = torch.load(reference_file, map_location=self.device)
            self._references[""].model.load_state_dict(state)
            self._is_reference_changed = True

    @torch.no_grad()
    def reset_reference(self, *, optimizer: bool) -> None:
        """Copies the policy's current weights to the reference.

        With `optimizer`, also resets the optimizer's moments and step counters.
        """
        for parameter, reference in zip(
            self._policy.model.parameters(), self._references[""].model.parameters(), strict=True
        ):
            with gathered([parameter], self._settings.zero_stage):
                reference.copy_(parameter)
        self._is_reference_changed = True
        if optimizer:
            self._reset_optimizer()

    def _reset_optimizer(self) -> None:
        optimizer = torch_optimizer(self._deepspeed_engine)
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                else:
                    state[key] = 0  # DeepSpeed's own Adam counts its steps in an int.
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = 0


def _current_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _prepare_policy_model(
    model: Any, settings: configs.ModelSettings, device: torch.device
) -> None:
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    moe.configure_routers(model, settings.router_aux_coef, settings.freeze_router)
    model.train()
    if device.type == "cuda":
        models.use_fused_norms(model)


def _freeze(reference: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Converts a model to a reference, in place."""
    # Only parameters are converted. Buffers (rotary frequencies) stay in float32, as they do in the
    # policy under DeepSpeed.
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype)
    reference.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        models.use_fused_norms(reference)


def _head_options(config: LearnerConfig) -> HeadOptions:
    return HeadOptions(
        temperature=config.logprob_temperature,
        chunk_tokens=config.learner.logits_chunk_tokens,
        float32=config.model.float32_head,
    )


def _reference_policy(reference: nn.Module, config: LearnerConfig, device: torch.device) -> Policy:
    """Returns a model as a frozen policy, in the dtype of the forward pass."""
    _freeze(reference, getattr(torch, config.model.dtype), device)
    return Policy(
        reference,
        _head_options(config),
        ulysses=ulysses.create_ulysses(reference, config.learner.sequence_parallel),
    )


class _DistillationWeights(NamedTuple):
    """The factors of a teacher's terms in the loss."""

    divergence: float
    hidden_errors: float


def _distillation_weights(
    config: LearnerConfig, soft: SoftTargetSettings | None
) -> _DistillationWeights | None:
    """Returns the weights of the teacher's terms; None if the loss has none.

    Source: Hinton 1503.02531 (the factor T^2 of soft targets).
    """
    if soft is not None:
        return _DistillationWeights(soft.soft_weight * soft.temperature**2, soft.hidden_weight)
    if config.algorithm.has_teacher_loss:
        return _DistillationWeights(config.algorithm.teacher_weight, 0.0)
    return None


def _soft_targets(
    config: LearnerConfig,
    soft: SoftTargetSettings | None,
    teachers: Mapping[str, Policy],
) -> SoftTargets | None:
    """Returns the teachers' part in the loss; None without one."""
    if soft is not None:
        return SoftTargets(
            teachers=teachers,
            divergence=soft.divergence,
            temperature=soft.temperature,
            beta=soft.beta,
            matches_layers=soft.hidden_weight > 0,
            layers=soft.hidden_layers,
        )
    algorithm = config.algorithm
    if not algorithm.has_teacher_loss:
        return None
    return SoftTargets(
        teachers=teachers,
        is_policy=not config.model.all_teachers,
        divergence=algorithm.teacher_divergence,
        # That of the sampler, as in the log-probabilities of the one-sample estimate.
        temperature=config.logprob_temperature,
        top_k=algorithm.teacher_top_k,
    )


def _vocabularies(references: Mapping[str, Reference], model: nn.Module) -> dict[str, Vocabularies]:
    """Returns the common tokens of the policy and each teacher with another vocabulary."""
    vocabularies = {}
    for name, reference in references.items():
        common = reference.vocabularies(model)
        if common is not None:
            vocabularies[name] = common
    return vocabularies


def _trained_policy(
    model: nn.Module, config: LearnerConfig, soft_targets: SoftTargets | None
) -> Policy:
    has_entropy_gradient = config.algorithm.entropy_coef != 0
    return Policy(
        model,
        replace(_head_options(config), entropy_gradient=has_entropy_gradient),
        router_loss=config.model.router_aux_coef > 0,
        soft_targets=soft_targets,
        ulysses=ulysses.create_ulysses(model, config.learner.sequence_parallel),
    )


def _with_distillation(
    result: Objective, output: PolicyOutput, weights: _DistillationWeights
) -> Objective:
    """Returns the objective plus the divergence from the teacher and the error of hidden states."""
    per_token = result.per_token
    metrics = dict(result.metrics)
    if output.divergences is not None:
        per_token = per_token + weights.divergence * output.divergences
        metrics["policy/divergence"] = output.divergences
    if output.hidden_errors is not None:
        per_token = per_token + weights.hidden_errors * output.hidden_errors
        metrics["policy/hidden"] = output.hidden_errors
    return replace(result, per_token=per_token, metrics=metrics)


def _token_metrics(totals: UpdateTotals, num_tokens: int) -> dict[str, float]:
    """Returns an update's loss, the token means of its metrics, and statistics of the ratios.

    `mismatch/effective` is the effective sample size as a share of the n tokens,
    (sum w)^2 / (n sum w^2), where w is the ratio to the sampler.

    Source: PipelineRL 2509.19128 (effective sample size).
    """
    metrics = {name: total / num_tokens for name, total in totals.metrics.items()}
    metrics["loss"] = totals.loss
    metrics["mismatch/max_weight"] = totals.max_ratio
    metrics["mismatch/effective"] = totals.ratio_sum**2 / (totals.ratio_squared_sum * num_tokens)
    return metrics
