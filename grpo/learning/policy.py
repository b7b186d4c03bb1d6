"""The policy: a causal language model that scores given tokens.

`Policy` maps a batch of tokens to the log-probabilities of its completion tokens. It never creates
a [B, T, V] tensor of logits.

Axes: B sequences, T positions, V vocabulary, H hidden size, N completion tokens of a batch (of this
rank, if ranks share the batch), K tokens of a teacher's top-k distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo.learning import moe, packing
from grpo.learning.alignment import TokenPair
from grpo.learning.divergence import (
    CommonTokens,
    SpanStart,
    Vocabularies,
    divergence,
    span_divergence,
    top_divergence,
)
from grpo.learning.token_logprobs import token_logprobs
from grpo.types import Batch, UserError


class PolicyOutput(NamedTuple):
    """The policy's values for the completion tokens of a micro-batch; 0 at all other positions.

    This is a NamedTuple because DeepSpeed's ZeRO-3 looks for the tensors of a module's output in
    tuples only.

    Attributes:
        logprobs: Log-probabilities of the tokens in `batch.labels`, [B, T] float32.
        entropies: Entropies of the policy's distribution, [B, T] float32.
        divergences: Divergences from the teacher's distribution, [B, T]. None without a teacher.
        hidden_errors: Errors of the projected hidden states, [B, T]. None if `soft.hidden_weight`
            is 0, or without a teacher model.
        expert_probabilities: The sums of the routers' probabilities (`moe.ExpertLoad`), [E]. None
            without `router_loss`.
        num_selected: The number of tokens that each expert processes, [E]. None without
            `router_loss`.
    """

    logprobs: Tensor
    entropies: Tensor
    divergences: Tensor | None = None
    hidden_errors: Tensor | None = None
    expert_probabilities: Tensor | None = None
    num_selected: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """Options of the output head.

    Attributes:
        temperature: Divides the logits, as the sampler does before its softmax.
        chunk_tokens: Number of positions whose logits exist at once.
        float32: Whether the logits are computed in float32.
        entropy_gradient: Whether the entropies carry a gradient.
    """

    temperature: float
    chunk_tokens: int
    float32: bool = False
    entropy_gradient: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """A model that is not trained: the reference of the KL, or a teacher.

    Attributes:
        model: The transformers model.
        common_tokens: The tokens that its vocabulary and the policy's have in common. None if the
            vocabularies are equal.
    """

    model: nn.Module
    common_tokens: Sequence[TokenPair] | None = None

    def vocabularies(self, policy: Any) -> Vocabularies | None:
        """Returns the common tokens as tensors on the device of a policy's model."""
        if self.common_tokens is None:
            return None
        model: Any = self.model
        student_ids = torch.tensor([pair.student for pair in self.common_tokens])
        teacher_ids = torch.tensor([pair.teacher for pair in self.common_tokens])
        return Vocabularies(
            _common_tokens(student_ids, policy.config.vocab_size, policy.device),
            _common_tokens(teacher_ids, model.config.vocab_size, policy.device),
        )


def _common_tokens(ids: Tensor, vocabulary: int, device: torch.device) -> CommonTokens:
    is_other = torch.ones(vocabulary, dtype=torch.bool)
    is_other[ids] = False
    return CommonTokens(ids.to(device), is_other.nonzero()[:, 0].to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTargets:
    """A teacher whose distribution the policy learns.

    Attributes:
        teachers: The teachers by name (`Batch.teacher`). The one with the name "" teaches all
            batches whose name is not in it. Empty if the batches hold its most likely tokens
            (`Batch.teacher_top`), or if the policy is its own teacher.
        is_policy: Whether the policy with its current weights is the teacher. It reads other
            prompts (`Batch.teacher_batch`).
        divergence: `forward_kl`, `reverse_kl` or `jsd` (grpo/learning/divergence.py).
        temperature: Divides the logits of both.
        beta: The weight of the teacher in `jsd`.
        top_k: Number of the teacher's most likely tokens to compare; all others count as one.
            None: all tokens of the vocabulary.
        matches_layers: Whether to compute the errors of hidden states.
        layers: Layers of student and teacher that are matched, see `soft.hidden_layers`.
        vocabularies: The common tokens of the policy and each teacher whose vocabulary differs, by
            the teacher's name. The divergence is then `divergence.span_divergence`, for which the
            temperature must be that of the output head.
    """

    teachers: Mapping[str, Policy]
    divergence: str
    temperature: float
    is_policy: bool = False
    beta: float = 0.5
    top_k: int | None = None
    matches_layers: bool = False
    layers: dict[int, int] = field(default_factory=dict)
    vocabularies: Mapping[str, Vocabularies] = field(default_factory=dict)

    def teacher_of(self, batch: Batch) -> Policy | None:
        """Returns the teacher of a batch; None if it is the policy, or not in memory."""
        return self.teachers.get(batch.teacher, self.teachers.get(""))


class LayerPair(NamedTuple):
    """The numbers, from 1, of a student layer and of the teacher layer it is matched with."""

    student: int
    teacher: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelRun:
    """The output of the transformers model for a batch, either packed or padded."""

    output: Any
    # Positions [B, T] that predict completion tokens and whose hidden states are on this rank.
    mask: Tensor
    layout: packing.Layout | None = None  # of a packed stream

    def predictor_states(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states [N, H] at `mask`.

        Args:
            hidden: The hidden states of the packed stream [1, tokens, H] or of the batch [B, T, H].
        """
        return self.predictor_rows(hidden.flatten(0, 1))

    def predictor_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows [N, ...] at `mask`.

        Args:
            rows: One row per token of the packed stream, or per position of the batch [B x T, ...].
        """
        if self.layout is None:
            return rows[self.mask.flatten()]
        return rows.index_select(0, self.layout.predictors)


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """Hidden states at the N positions that predict completion tokens."""

    last: Tensor  # of the last layer, [N, H]
    layers: list[Tensor]  # of the layers that are matched with the teacher's, [N, H] each
    mask: Tensor  # the N positions, [B, T] bool
    expert_load: moe.ExpertLoad | None


class _SpanRows(NamedTuple):
    """Values at the first tokens of spans."""

    hidden: Tensor  # hidden states, [K, H]
    first_ids: Tensor  # the first tokens, [K]
    rest: Tensor  # log-probabilities of the other tokens of each span, [K]


@dataclass(slots=True, kw_only=True)
class _HeadOutput:
    """Values of the N completion tokens, one tensor per chunk. `_run_head` appends to the lists."""

    logprobs: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)


class Policy(nn.Module):
    """A transformers model that returns log-probabilities and entropies of given tokens.

    The output head runs only at the positions of `Batch.token_mask`, one chunk of positions at a
    time. The backward pass recomputes the logits. Their memory is [chunk, V], independent of the
    batch size.
    """

    def __init__(
        self,
        model: Any,
        head: HeadOptions,
        *,
        router_loss: bool = False,
        soft_targets: SoftTargets | None = None,
        ulysses: Any = None,
    ) -> None:
        """Wraps a transformers model.

        Args:
            model: The model.
            head: Options of the output head.
            router_loss: Whether to return the load of a mixture of experts.
            soft_targets: The teacher to compute divergences from.
            ulysses: Splits the stream of tokens across ranks (grpo/learning/ulysses.py).

        Raises:
            UserError: `soft.hidden_layers` names a layer that a model does not have.
        """
        super().__init__()
        self.model: Any = model
        self.projections = nn.ModuleDict()
        self._head = head
        self._router_loss = router_loss
        self._soft_targets = soft_targets  # not a submodule: the teacher is not trained
        self._ulysses = ulysses
        self._layer_pairs: list[LayerPair] = []
        if soft_targets is not None and soft_targets.teachers and soft_targets.matches_layers:
            self._add_projections(soft_targets.teachers[""], soft_targets.layers)

    def _add_projections(self, teacher: Policy, hidden_layers: dict[int, int]) -> None:
        """Adds the trained maps from the student's hidden states to the teacher's."""
        student_config = self.model.config
        teacher_config = teacher.model.config
        self._layer_pairs = _layer_pairs(
            student_config.num_hidden_layers, teacher_config.num_hidden_layers, hidden_layers
        )
        self.projections.update(
            _projections(self._layer_pairs, student_config.hidden_size, teacher_config.hidden_size)
        )

    def forward(self, batch: Batch) -> PolicyOutput:
        """Returns the values of the batch's completion tokens. Position t predicts `labels[:, t]`.

        The optional fields of the output depend on the arguments of the constructor.
        """
        states = self._states(batch, [pair.student for pair in self._layer_pairs])
        teacher_states = self._teacher_states(batch, has_gradient=torch.is_grad_enabled())
        hidden_errors = None
        if teacher_states is not None and self._layer_pairs:
            errors = self._hidden_errors(states, teacher_states)
            hidden_errors = self._grid([errors], states.mask)
        if teacher_states is not None and batch.spans is not None:
            head_output = self._run_head(batch, states, None)
            token_logprobs = torch.cat(head_output.logprobs)
            head_output.divergences.append(
                self._span_divergences(batch, states, teacher_states, token_logprobs)
            )
        else:
            head_output = self._run_head(batch, states, teacher_states)
        logprobs = self._grid(head_output.logprobs, states.mask)
        entropies = self._grid(head_output.entropies, states.mask)
        divergences = None
        if head_output.divergences:
            divergences = self._grid(head_output.divergences, states.mask)
        load = states.expert_load
        return PolicyOutput(
            logprobs=logprobs,
            entropies=entropies,
            divergences=divergences,
            hidden_errors=hidden_errors,
            expert_probabilities=load.probabilities if load is not None else None,
            num_selected=load.num_selected if load is not None else None,
        )

    def _grid(self, chunks: list[Tensor], mask: Tensor) -> Tensor:
        """Returns the values of all ranks' tokens as a grid [B, T].

        Args:
            chunks: The values of this rank's N tokens, in order.
            mask: The positions of these tokens, [B, T] bool.
        """
        grid = _scatter(chunks, mask)
        if self._ulysses is None:
            return grid
        complete_grid: Tensor = self._ulysses.sum_over_ranks(grid)
        return complete_grid

    @torch.no_grad()
    def _teacher_states(self, batch: Batch, *, has_gradient: bool) -> _States | None:
        """Returns the teacher's states; None without a teacher, or if no loss needs them.

        They are those of the batch's completion tokens, also if the teacher reads other prompts.
        """
        teacher = self._teacher(batch)
        if teacher is None or not has_gradient:
            return None
        teacher_layers = [pair.teacher for pair in self._layer_pairs]
        teacher_batch = batch if batch.teacher_batch is None else batch.teacher_batch
        return teacher._states(teacher_batch, teacher_layers)

    def _teacher(self, batch: Batch) -> Policy | None:
        """Returns a batch's teacher, which may be this policy; None without one in memory."""
        if self._soft_targets is None:
            return None
        return self if self._soft_targets.is_policy else self._soft_targets.teacher_of(batch)

    def _hidden_errors(self, states: _States, teacher_states: _States) -> Tensor:
        """Returns the mean squared error [N] of projected hidden states, averaged over layers."""
        errors = []
        for projection, hidden, teacher_hidden in zip(
            self.projections.values(), states.layers, teacher_states.layers, strict=True
        ):
            difference = projection(hidden) - teacher_hidden
            errors.append(difference.float().square().mean(-1))
        return torch.stack(errors).mean(0)

    def _states(self, batch: Batch, layers: list[int]) -> _States:
        """Runs the model up to the output head.

        Args:
            batch: The micro-batch.
            layers: The layers whose hidden states are returned in addition to the last one's.
        """
        options: dict[str, Any] = {"use_cache": False}
        if self._router_loss:
            options["output_router_logits"] = True
        if layers:
            options["output_hidden_states"] = True
        if self.model.config._attn_implementation == packing.PACKED_ATTENTION:
            run = self._run_packed(batch, options)
        else:
            run = self._run_padded(batch, options)
        expert_load = None
        if self._router_loss:
            # At the N positions only, so that the load does not depend on padding, or on how often
            # a prompt is computed.
            router_logits = [run.predictor_rows(logits) for logits in run.output.router_logits]
            expert_load = moe.expert_load(self.model, router_logits)
        return _States(
            last=run.predictor_states(run.output.last_hidden_state),
            layers=[run.predictor_states(run.output.hidden_states[layer]) for layer in layers],
            mask=run.mask,
            expert_load=expert_load,
        )

    def _run_packed(self, batch: Batch, options: dict[str, Any]) -> _ModelRun:
        device = batch.input_ids.device
        mask = batch.token_mask
        has_kernel = packing.supports_varlen_kernel(self.model.config, self.model.dtype, device)
        layout = packing.make_layout(
            batch.sequences, batch.prompt_lengths, device, kernel=has_kernel
        )
        if self._ulysses is not None:
            layout, is_local = self._ulysses.local_slice(layout)
            mask = torch.zeros_like(mask).masked_scatter_(mask, is_local)
        output = self.model.base_model(
            input_ids=layout.ids, position_ids=layout.positions, packed=layout, **options
        )
        return _ModelRun(output=output, mask=mask, layout=layout)

    def _run_padded(self, batch: Batch, options: dict[str, Any]) -> _ModelRun:
        output = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options
        )
        return _ModelRun(output=output, mask=batch.token_mask)

    def _run_head(
        self, batch: Batch, states: _States, teacher_states: _States | None
    ) -> _HeadOutput:
        """Runs the output head on all completion tokens, one chunk at a time."""
        targets = batch.labels[states.mask]  # [N]
        teacher_top = None
        if teacher_states is None and batch.teacher_top is not None:
            is_local = states.mask[batch.token_mask]
            teacher_top = [values[is_local] for values in batch.teacher_top]  # [N, K] each
        float32_weight = self._float32_weight() if self._head.float32 else None
        output = _HeadOutput()
        teacher = self._teacher(batch)
        # All ranks run the head in the same number of chunks, because ZeRO-3 gathers its weights
        # for each chunk.
        num_positions = max(len(states.last), batch.max_rank_tokens)
        for start in range(0, num_positions, self._head.chunk_tokens):
            chunk = slice(start, start + self._head.chunk_tokens)
            hidden = states.last[chunk]
            logprobs, entropies = checkpoint(
                self._logprobs, hidden, targets[chunk], float32_weight, use_reentrant=False
            )
            output.logprobs.append(logprobs)
            output.entropies.append(entropies)
            if teacher_states is not None:
                divergences = checkpoint(
                    self._divergence,
                    hidden,
                    teacher,
                    teacher_states.last[chunk],
                    use_reentrant=False,
                )
                output.divergences.append(divergences)
            elif teacher_top is not None:
                ids, top_logprobs = teacher_top
                divergences = checkpoint(
                    self._top_divergence,
                    hidden,
                    ids[chunk],
                    top_logprobs[chunk],
                    use_reentrant=False,
                )
                output.divergences.append(divergences)
        return output

    def _logprobs(
        self, hidden: Tensor, targets: Tensor, float32_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities of the targets and the entropies, of one chunk."""
        logits = self._logits(hidden, float32_weight)
        return token_logprobs(
            logits,
            targets,
            temperature=self._head.temperature,
            entropy_gradient=self._head.entropy_gradient,
        )

    def _span_divergences(
        self, batch: Batch, states: _States, teacher_states: _States, logprobs: Tensor
    ) -> Tensor:
        """Returns the divergences [N] from a teacher with another vocabulary.

        The divergence of a span is that of its first token; all other tokens have 0.

        Args:
            batch: The micro-batch.
            states: The policy's hidden states.
            teacher_states: The teacher's hidden states at its M completion tokens.
            logprobs: The policy's log-probabilities of the N completion tokens, with a gradient.
        """
        teacher = self._teacher(batch)
        assert self._soft_targets is not None and teacher is not None
        assert batch.spans is not None and batch.teacher_batch is not None
        spans = batch.spans
        vocabularies = self._soft_targets.vocabularies[batch.teacher]
        with torch.no_grad():
            teacher_head = teacher._run_head(batch.teacher_batch, teacher_states, None)
        num_spans = len(spans.student_starts)
        student_rest = _sum_by_span(logprobs, spans.student_spans, num_spans)
        teacher_rest = _sum_by_span(
            torch.cat(teacher_head.logprobs), spans.teacher_spans, num_spans
        )
        student_ids = batch.labels[states.mask]
        teacher_ids = batch.teacher_batch.labels[teacher_states.mask]
        divergences = []
        # All ranks run the head in the same number of chunks, as in `_run_head`.
        num_positions = max(len(states.last), batch.max_rank_tokens)
        for start in range(0, num_positions, self._head.chunk_tokens):
            chunk = slice(start, start + self._head.chunk_tokens)
            student_starts = spans.student_starts[chunk]
            teacher_starts = spans.teacher_starts[chunk]
            divergences.append(
                checkpoint(
                    self._span_divergence,
                    _SpanRows(
                        states.last[student_starts],
                        student_ids[student_starts],
                        student_rest[chunk],
                    ),
                    teacher,
                    _SpanRows(
                        teacher_states.last[teacher_starts],
                        teacher_ids[teacher_starts],
                        teacher_rest[chunk],
                    ),
                    vocabularies,
                    use_reentrant=False,
                )
            )
        zeros = torch.zeros_like(logprobs)
        return zeros.index_copy(0, spans.student_starts, torch.cat(divergences))

    def _span_divergence(
        self, rows: _SpanRows, teacher: Policy, teacher_rows: _SpanRows, vocabularies: Vocabularies
    ) -> Tensor:
        """Returns the divergences of one chunk of spans."""
        assert self._soft_targets is not None
        start = self._span_start(rows, vocabularies.student)
        with torch.no_grad():
            teacher_start = teacher._span_start(teacher_rows, vocabularies.teacher)
        targets = self._soft_targets
        return span_divergence(start, teacher_start, targets.divergence, targets.beta)

    def _span_start(self, rows: _SpanRows, common: CommonTokens) -> SpanStart:
        logits = self._logits(rows.hidden) / self._head.temperature
        return SpanStart(logits, rows.first_ids, rows.rest, common)

    def _divergence(self, hidden: Tensor, teacher: Policy, teacher_hidden: Tensor) -> Tensor:
        """Returns the divergences of one chunk from the teacher's distribution."""
        targets = self._soft_targets
        assert targets is not None
        logits = self._logits(hidden)
        with torch.no_grad():  # The policy's own head may be the teacher's.
            teacher_logits = teacher._logits(teacher_hidden)
        if targets.top_k is None:
            return divergence(
                logits, teacher_logits, targets.divergence, targets.temperature, targets.beta
            )
        # The vocabularies may be padded to different sizes (Qwen2.5). The common part counts.
        vocabulary = min(logits.shape[-1], teacher_logits.shape[-1])
        student_logits = logits[:, :vocabulary].float() / targets.temperature
        teacher_logits = teacher_logits[:, :vocabulary].float() / targets.temperature
        top = teacher_logits.log_softmax(-1).topk(min(targets.top_k, vocabulary), dim=-1)
        return top_divergence(
            student_logits, top.indices, top.values, targets.divergence, targets.beta
        )

    def _top_divergence(self, hidden: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        """Returns the divergences of one chunk from the teacher's K most likely tokens."""
        assert self._soft_targets is not None
        targets = self._soft_targets
        return top_divergence(self._logits(hidden), ids, logprobs, targets.divergence, targets.beta)

    def _float32_weight(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight.float()
        return weight

    def _logits(self, hidden: Tensor, float32_weight: Tensor | None = None) -> Tensor:
        """Returns the logits, before the division by the temperature.

        `float32_weight` is the head's weight in float32, converted once for all chunks.
        """
        head = self.model.get_output_embeddings()
        if not self._head.float32:
            logits: Tensor = head(hidden)
            return logits
        if float32_weight is None:
            float32_weight = self._float32_weight()
        return F.linear(hidden.float(), float32_weight, head.bias)


def _layer_pairs(
    num_student_layers: int, num_teacher_layers: int, hidden_layers: dict[int, int]
) -> list[LayerPair]:
    """Returns the layers whose hidden states are matched.

    If `soft.hidden_layers` is empty, student layer m is matched with the teacher layer at the same
    relative depth, m L_teacher / L_student, rounded.

    Raises:
        UserError: A layer does not exist.

    Source: TinyBERT 1909.10351 (evenly spread layers).
    """
    if hidden_layers:
        pairs = [LayerPair(student, teacher) for student, teacher in hidden_layers.items()]
    else:
        pairs = [
            LayerPair(layer, round(layer * num_teacher_layers / num_student_layers))
            for layer in range(1, num_student_layers + 1)
        ]
    for pair in pairs:
        is_student_layer = 1 <= pair.student <= num_student_layers
        is_teacher_layer = 1 <= pair.teacher <= num_teacher_layers
        if not (is_student_layer and is_teacher_layer):
            raise UserError(
                f"soft.hidden_layers: {{{pair.student}: {pair.teacher}}} names a layer that does "
                f"not exist. The student has layers 1 to {num_student_layers}, the teacher 1 to "
                f"{num_teacher_layers}."
            )
    return pairs


def _projections(
    pairs: list[LayerPair], student_size: int, teacher_size: int
) -> dict[str, nn.Module]:
    """Returns one linear map from student to teacher hidden states per pair of layers.

    The keys are part of the checkpoint: `{"1_2": Linear, "2_4": Linear}` for student layer 1 with
    teacher layer 2, and 2 with 4.
    """
    projections: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for pair in pairs:
            projection = nn.Linear(student_size, teacher_size, bias=False)
            nn.init.orthogonal_(projection.weight)
            projections[f"{pair.student}_{pair.teacher}"] = projection
    return projections


def _sum_by_span(values: Tensor, spans: Tensor, num_spans: int) -> Tensor:
    """Returns the sums [K] of the values [N] of each span; `spans` [N] is -1 for no span."""
    has_span = spans >= 0
    zeros = torch.zeros(num_spans, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, spans[has_span], values[has_span])


def _scatter(chunks: list[Tensor], mask: Tensor) -> Tensor:
    """Returns a float32 grid [B, T] with the values of the chunks, in order, where `mask` is set.

    All other positions are 0.
    """
    grid = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    if not chunks:
        return grid
    return grid.masked_scatter(mask, torch.cat(chunks))
