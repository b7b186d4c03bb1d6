"""The policy as the learner sees it.

Tokens in, log-probabilities of the completion tokens out, never a [B, T, V] tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo.learning import moe, packing
from grpo.learning.divergence import divergence, top_divergence
from grpo.types import Batch, UserError

if TYPE_CHECKING:
    from grpo.config import Soft


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
        """`temperature` divides the logits; `chunk` is how many positions the head does at once."""
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.chunk = chunk
        self.ulysses = ulysses  # of ranks that share a stream (grpo/learning/ulysses.py)
        self.float32_head, self.entropy_gradient = float32_head, entropy_gradient
        self._teacher, self._soft = (teacher,), soft  # in a tuple: no part of this module
        self.divergences: Tensor | None = None  # [B, T] of the last forward pass, from the teacher
        # [B, T] likewise: hidden states, with soft.hidden_weight
        self.hidden_errors: Tensor | None = None
        self.projections = nn.ModuleDict(
            _projections(model, teacher.model, soft)
            if teacher and soft and soft.hidden_weight
            else {}
        )
        # the load-balancing loss of the last forward pass, with `router`
        self.router, self.balance_loss = router, torch.zeros(())

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns `(logprobs, entropies)`, both [B, T] float32, 0 where `token_mask` is not set.

        Entropies carry a gradient if asked.

        Position t predicts `labels[:, t]`. Temperature divides the logits, as the sampler does
        before its softmax.
        """
        states, hidden, mask = self._states(batch)  # [N, H]
        targets, own = batch.labels[mask], mask[batch.token_mask]  # [N]
        weight = self.model.get_output_embeddings().weight.float() if self.float32_head else None
        teacher, theirs = self._teacher[0], None
        if teacher is not None:
            with torch.no_grad():
                theirs, their_hidden, _ = teacher._states(
                    batch, [int(name.split("_")[1]) for name in self.projections]
                )
            errors = [
                (project(own) - its).float().square().mean(-1)
                for project, own, its in zip(
                    self.projections.values(), hidden, their_hidden, strict=True
                )
            ]
            self.hidden_errors = self._grid([torch.stack(errors).mean(0)], mask) if errors else None
        logprobs, entropies, divergences = [], [], list[Tensor]()
        # past the last state the head has nothing to do
        for start in range(0, max(len(states), batch.most), self.chunk):
            piece = slice(start, start + self.chunk)
            logprob, entropy = checkpoint(
                self._head, states[piece], targets[piece], weight, use_reentrant=False
            )
            logprobs.append(logprob)
            entropies.append(entropy)
            if theirs is not None:
                divergences.append(
                    checkpoint(self._divergence, states[piece], theirs[piece], use_reentrant=False)
                )
            elif batch.teacher_top is not None:
                top = [part[own][piece] for part in batch.teacher_top]
                divergences.append(
                    checkpoint(self._top_divergence, states[piece], *top, use_reentrant=False)
                )
        self.divergences = self._grid(divergences, mask) if divergences else None
        return self._grid(logprobs, mask), self._grid(entropies, mask)

    def _grid(self, pieces: list[Tensor], mask: Tensor) -> Tensor:
        grid = _scatter(pieces, mask)
        return grid if self.ulysses is None else self.ulysses.whole(grid)

    def _states(
        self, batch: Batch, layers: list[int] | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns states that predict completion tokens, those of `layers`, and the tokens' places.

        The states are the last hidden states, row by row. `layers` defaults to the projected
        layers. The places are [B, T]. All three are of all completion tokens, or of this rank's.
        """
        layers = (
            [int(name.split("_")[0]) for name in self.projections] if layers is None else layers
        )
        more = ({"output_router_logits": True} if self.router else {}) | (
            {"output_hidden_states": True} if layers else {}
        )
        mask: Tensor | None = None
        places = batch.token_mask
        if self.model.config._attn_implementation != packing.NAME:
            mask = batch.attention_mask
            out = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **more
            )

            def chosen(states: Tensor) -> Tensor:
                return states[batch.token_mask]
        else:
            device = batch.input_ids.device
            kernel = packing.has_kernel(self.model.config, self.model.dtype, device)
            layout = packing.layout(batch.sequences, batch.prompt_lengths, device, kernel=kernel)
            if self.ulysses is not None:
                layout, own = self.ulysses.part(layout)
                places = torch.zeros_like(places).masked_scatter_(places, own)
            out = self.model.base_model(
                input_ids=layout.ids,
                position_ids=layout.positions,
                use_cache=False,
                packed=layout,
                **more,
            )

            def chosen(states: Tensor) -> Tensor:
                return states[0].index_select(0, layout.predictors)

        if self.router:
            self.balance_loss = moe.balance_loss(self.model, out.router_logits, mask)
        return (
            chosen(out.last_hidden_state),
            [chosen(out.hidden_states[layer]) for layer in layers],
            places,
        )

    def _divergence(self, states: Tensor, theirs: Tensor) -> Tensor:
        """Returns the divergence from the teacher at each position.

        In the backward pass everything is computed again, the logits included.
        """
        teacher, soft = self._teacher[0], self._soft
        assert teacher is not None and soft is not None
        own, its = (policy._logits(part) for policy, part in ((self, states), (teacher, theirs)))
        return divergence(own, its, soft.divergence, soft.temperature, soft.beta)

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

    def _logits(self, states: Tensor, weight: Tensor | None = None) -> Tensor:
        """`weight`: the head's in float32, made once for all chunks."""
        head = self.model.get_output_embeddings()
        if not self.float32_head:
            logits: Tensor = head(states)
            return logits
        return F.linear(
            states.float(), head.weight.float() if weight is None else weight, head.bias
        )


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
    """Returns the maps from the student's hidden states to the teacher's, by "own layer_its layer".

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
