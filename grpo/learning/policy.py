"""The policy as the learner sees it.

Tokens in, log-probabilities of the completion tokens out, never a [B, T, V] tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo.learning import moe, packing
from grpo.learning.divergence import divergence, top_divergence
from grpo.types import Batch, UserError

if TYPE_CHECKING:
    from grpo.config import Soft


class PolicyOutput(NamedTuple):
    """What the policy says of a micro-batch's completion tokens; 0 at all other positions.

    A NamedTuple, because DeepSpeed's ZeRO-3 looks for a module's tensors in tuples only.
    """

    logprobs: Tensor  # [B, T] float32, of the tokens in `batch.labels`
    entropies: Tensor  # [B, T] float32, of the policy's distribution
    divergences: Tensor | None = None  # [B, T], from the teacher's distribution
    hidden_errors: Tensor | None = None  # [B, T], of projected hidden states (soft.hidden_weight)
    balance_loss: Tensor | None = None  # [], the router's load-balancing loss


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """Hidden states that predict completion tokens: of all of them, or of this rank's N."""

    last: Tensor  # [N, H], the last layer's
    layers: list[Tensor]  # [N, H] each, of the layers that are compared with the teacher's
    places: Tensor  # [B, T] bool: where the N tokens are
    balance_loss: Tensor | None


class Policy(nn.Module):
    """A causal language model that returns log-probabilities and entropies of given tokens.

    The logits are divided by a temperature.

    The output head runs only where `token_mask` is set, `chunk` positions at a time, and its logits
    are computed again in the backward pass: memory is chunk x V, whatever the batch.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float,
        chunk: int,
        float32_head: bool = False,
        entropy_gradient: bool = False,
        router: bool = False,
        teacher: Policy | None = None,
        soft: Soft | None = None,
        ulysses: Any = None,
    ) -> None:
        """Wraps a transformers model.

        Args:
            model: the model.
            temperature: divides the logits.
            chunk: positions that the head computes at once.
            float32_head: whether the head computes in float32.
            entropy_gradient: whether entropies carry a gradient.
            router: whether to return the load-balancing loss of a mixture of experts.
            teacher: the policy that divergences are measured to.
            soft: how they are measured.
            ulysses: shares the stream among ranks (grpo/learning/ulysses.py).
        """
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.chunk = chunk
        self.ulysses = ulysses
        self.float32_head = float32_head
        self.entropy_gradient = entropy_gradient
        self.router = router
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        self._soft = soft
        self.projections = nn.ModuleDict()
        if teacher is not None and soft is not None and soft.hidden_weight:
            self.projections.update(_projections(model, teacher.model, soft))

    def forward(self, batch: Batch) -> PolicyOutput:
        """Returns log-probabilities, entropies and whatever else the policy was made for.

        Position t predicts `labels[:, t]`. Temperature divides the logits, as the sampler does
        before its softmax.
        """
        student_layers = [student_layer for student_layer, _ in self._layer_pairs()]
        states = self._states(batch, student_layers)
        teacher_states = self._teacher_states(batch)
        hidden_errors = None
        if teacher_states is not None and self.projections:
            errors = self._hidden_errors(states, teacher_states)
            hidden_errors = self._grid([errors], states.places)
        targets = batch.labels[states.places]  # [N]
        teacher_top = None
        if teacher_states is None and batch.teacher_top is not None:
            held = states.places[batch.token_mask]
            teacher_top = [part[held] for part in batch.teacher_top]  # [N, k]
        weight = self._float32_weight() if self.float32_head else None
        logprobs: list[Tensor] = []
        entropies: list[Tensor] = []
        divergences: list[Tensor] = []
        # Every rank runs the head as often as the rank with most tokens.
        for start in range(0, max(len(states.last), batch.most), self.chunk):
            piece = slice(start, start + self.chunk)
            last = states.last[piece]
            logprob, entropy = checkpoint(
                self._head, last, targets[piece], weight, use_reentrant=False
            )
            logprobs.append(logprob)
            entropies.append(entropy)
            if teacher_states is not None:
                piece_divergence = checkpoint(
                    self._divergence, last, teacher_states.last[piece], use_reentrant=False
                )
                divergences.append(piece_divergence)
            elif teacher_top is not None:
                ids, top_logprobs = teacher_top
                piece_divergence = checkpoint(
                    self._top_divergence,
                    last,
                    ids[piece],
                    top_logprobs[piece],
                    use_reentrant=False,
                )
                divergences.append(piece_divergence)
        return PolicyOutput(
            logprobs=self._grid(logprobs, states.places),
            entropies=self._grid(entropies, states.places),
            divergences=self._grid(divergences, states.places) if divergences else None,
            hidden_errors=hidden_errors,
            balance_loss=states.balance_loss,
        )

    def _grid(self, pieces: list[Tensor], mask: Tensor) -> Tensor:
        grid = _scatter(pieces, mask)
        return grid if self.ulysses is None else self.ulysses.whole(grid)

    def _layer_pairs(self) -> list[tuple[int, int]]:
        """Returns the layers that are compared: student's, teacher's."""
        pairs = []
        for name in self.projections:
            student_layer, _, teacher_layer = name.partition("_")
            pairs.append((int(student_layer), int(teacher_layer)))
        return pairs

    @torch.no_grad()
    def _teacher_states(self, batch: Batch) -> _States | None:
        teacher = self._teacher[0]
        if teacher is None:
            return None
        return teacher._states(batch, [teacher_layer for _, teacher_layer in self._layer_pairs()])

    def _hidden_errors(self, states: _States, teacher_states: _States) -> Tensor:
        """Returns the mean squared error [N] of projected hidden states, averaged over layers."""
        errors = []
        for project, student_hidden, teacher_hidden in zip(
            self.projections.values(), states.layers, teacher_states.layers, strict=True
        ):
            difference = project(student_hidden) - teacher_hidden
            errors.append(difference.float().square().mean(-1))
        return torch.stack(errors).mean(0)

    def _states(self, batch: Batch, layers: list[int]) -> _States:
        """Returns the hidden states that predict completion tokens, of the last and of `layers`."""
        options: dict[str, Any] = {}
        if self.router:
            options["output_router_logits"] = True
        if layers:
            options["output_hidden_states"] = True
        attention_mask: Tensor | None = None
        places = batch.token_mask
        if self.model.config._attn_implementation == packing.NAME:
            device = batch.input_ids.device
            kernel = packing.has_kernel(self.model.config, self.model.dtype, device)
            layout = packing.layout(batch.sequences, batch.prompt_lengths, device, kernel=kernel)
            if self.ulysses is not None:
                layout, held = self.ulysses.part(layout)
                places = torch.zeros_like(places).masked_scatter_(places, held)
            out = self.model.base_model(
                input_ids=layout.ids,
                position_ids=layout.positions,
                use_cache=False,
                packed=layout,
                **options,
            )

            def predictors(hidden: Tensor) -> Tensor:
                return hidden[0].index_select(0, layout.predictors)
        else:
            attention_mask = batch.attention_mask
            out = self.model.base_model(
                input_ids=batch.input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **options,
            )

            def predictors(hidden: Tensor) -> Tensor:
                return hidden[batch.token_mask]

        balance_loss = None
        if self.router:
            balance_loss = moe.balance_loss(self.model, out.router_logits, attention_mask)
        return _States(
            last=predictors(out.last_hidden_state),
            layers=[predictors(out.hidden_states[layer]) for layer in layers],
            places=places,
            balance_loss=balance_loss,
        )

    def _divergence(self, states: Tensor, teacher_states: Tensor) -> Tensor:
        """Returns the divergence from the teacher at each position.

        In the backward pass everything is computed again, the logits included.
        """
        teacher = self._teacher[0]
        soft = self._soft
        assert teacher is not None and soft is not None
        return divergence(
            self._logits(states),
            teacher._logits(teacher_states),
            soft.divergence,
            soft.temperature,
            soft.beta,
        )

    def _top_divergence(self, states: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        assert self._soft is not None
        return top_divergence(
            self._logits(states), ids, logprobs, self._soft.divergence, self._soft.beta
        )

    def _head(
        self, states: Tensor, targets: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(states, weight)
        logprobs_and_entropies: tuple[Tensor, Tensor]
        logprobs_and_entropies = _LogProbs.apply(  # type: ignore[no-untyped-call]
            logits, targets, self.temperature, self.entropy_gradient
        )
        return logprobs_and_entropies

    def _float32_weight(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight.float()
        return weight

    def _logits(self, states: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns logits [N, V]; `weight` is the head's in float32, made once for all chunks."""
        head = self.model.get_output_embeddings()
        if not self.float32_head:
            logits: Tensor = head(states)
            return logits
        if weight is None:
            weight = self._float32_weight()
        return F.linear(states.float(), weight, head.bias)


class _LogProbs(torch.autograd.Function):
    """Logits [N, V] -> log-probabilities and entropies [N] of targets, in float32.

    The gradient keeps the logits' dtype.

    Plain autograd makes ten passes over the vocabulary. On a CPU the few that are left go row block
    by row block, within the cache: together four times as fast as whole, where they took longer
    than the head's matrix product. On a GPU: grpo/learning/logprob_kernels.py.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        values = logprob_kernels().values if logits.is_cuda else _values
        logprobs, entropies, normalisers = values(logits, targets, temperature=temperature)
        ctx.save_for_backward(logits, targets, normalisers, entropies)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, normalisers, entropies = ctx.saved_tensors
        gradient = logprob_kernels().gradient if logits.is_cuda else _gradient
        entropy_grad_or_none = entropy_grad if ctx.entropy_gradient else None
        logits_grad = gradient(
            logits,
            targets,
            normalisers,
            entropies,
            grad,
            entropy_grad_or_none,
            temperature=ctx.temperature,
        )
        return logits_grad, None, None, None


def logprob_kernels() -> Any:
    """Returns the module of Triton kernels, which comes with PyTorch for CUDA."""
    from grpo.learning import logprob_kernels

    return logprob_kernels


def _values(
    logits: Tensor, targets: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `values` of grpo/learning/logprob_kernels.py."""
    logprobs, entropies, normalisers = (
        torch.empty(len(logits), device=logits.device) for _ in range(3)
    )
    for rows, scaled in _row_blocks(logits, temperature):
        highest = scaled.amax(-1, keepdim=True)
        picked = scaled.gather(-1, targets[rows, None])[:, 0]
        weights = torch.exp(scaled - highest)
        total = weights.sum(-1)
        normalisers[rows] = highest[:, 0] + total.log()
        logprobs[rows] = picked - normalisers[rows]
        entropies[rows] = normalisers[rows] - torch.linalg.vecdot(weights, scaled) / total
    return logprobs, entropies, normalisers


def _gradient(
    logits: Tensor,
    targets: Tensor,
    normalisers: Tensor,
    entropies: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """As `gradient` of grpo/learning/logprob_kernels.py."""
    out = torch.empty_like(logits)
    grad = grad[:, None] / temperature
    for rows, scaled in _row_blocks(logits, temperature):
        factor = -grad[rows]
        scaled.sub_(normalisers[rows, None])
        if entropy_grad is not None:
            factor = factor - entropy_grad[rows, None] / temperature * (
                scaled + entropies[rows, None]
            )
        scaled.exp_().mul_(factor).scatter_add_(-1, targets[rows, None], grad[rows])
        out[rows] = scaled.to(out.dtype)
    return out


def _projections(student: Any, teacher: Any, soft: Soft) -> dict[str, nn.Module]:
    """Returns the maps from the student's hidden states to the teacher's.

    They are named "student layer_teacher layer".

    Without a map of the layers, layer m goes with m L_teacher / L_student (TinyBERT 1909.10351).
    Raises UserError for a layer that is not there.
    """
    own, its = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    pairs = soft.hidden_layers or {m: round(m * its / own) for m in range(1, own + 1)}
    for m, n in pairs.items():
        if not (1 <= m <= own and 1 <= n <= its):
            raise UserError(
                f"soft.hidden_layers: {m}: {n}; the student has layers 1 to {own}, the teacher 1 "
                f"to {its}"
            )
    made: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for m, n in pairs.items():
            projection = nn.Linear(
                student.config.hidden_size, teacher.config.hidden_size, bias=False
            )
            nn.init.orthogonal_(projection.weight)
            made[f"{m}_{n}"] = projection
    return made


def _row_blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yields `(rows, logits[rows] / temperature)` in float32, in one buffer that is used again."""
    # on a CPU 4 MB
    size = max(
        1, min(len(logits), 2**20 // logits.shape[1] if logits.device.type == "cpu" else 2**20)
    )
    buffer = torch.empty(size, logits.shape[1], device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        scaled = buffer[: rows.stop - start].copy_(logits[rows])
        yield rows, scaled if temperature == 1 else scaled.div_(temperature)


def _scatter(pieces: list[Tensor], mask: Tensor) -> Tensor:
    """Returns a float32 [B, T] grid with the pieces' values, in order, where the mask is set."""
    grid = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return grid.masked_scatter(mask, torch.cat(pieces)) if pieces else grid
