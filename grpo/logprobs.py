"""The policy as the learner sees it: tokens in, log-probabilities of the completion tokens out, never a [B, T, V] tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo import packing
from grpo.types import Batch


class Policy(nn.Module):
    """A causal language model that returns log-probabilities and entropies of given tokens at a temperature.

    The output head runs only where `token_mask` is set, `chunk` positions at a time, and its logits are computed again in the
    backward pass: memory is chunk x V, whatever the batch.
    """

    def __init__(self, model: Any, *, temperature: float, chunk: int) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.chunk = chunk

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns `(logprobs, entropies)`, both [B, T] float32, 0 where `token_mask` is not set; entropies carry no gradient.

        Position t predicts `labels[:, t]`. Temperature divides the logits, as the sampler does before its softmax.
        """
        states, targets = self._states(batch), batch.labels[batch.token_mask]  # [N, H], [N]
        logprobs, entropies = [], []
        for start in range(0, len(states), self.chunk):
            piece = slice(start, start + self.chunk)
            logprob, entropy = checkpoint(self._head, states[piece], targets[piece], use_reentrant=False)
            logprobs.append(logprob)
            entropies.append(entropy)
        return _scatter(logprobs, batch.token_mask), _scatter(entropies, batch.token_mask)

    def _states(self, batch: Batch) -> Tensor:
        """Returns the last hidden states that predict completion tokens, row by row."""
        if self.model.config._attn_implementation != packing.NAME:
            out = self.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            return out.last_hidden_state[batch.token_mask]
        layout = packing.layout(batch.sequences, batch.prompt_lengths, batch.input_ids.device)
        out = self.model.base_model(input_ids=layout.ids, position_ids=layout.positions, use_cache=False, packed=layout)
        return out.last_hidden_state[0].index_select(0, layout.predictors)

    def _head(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _LogProbs.apply(self.model.get_output_embeddings()(states), targets, self.temperature)


class _LogProbs(torch.autograd.Function):
    """Logits [N, V] -> log-probabilities and entropies [N] of targets, in float32; the gradient keeps the logits' dtype.

    Plain autograd makes ten passes over the vocabulary. On a CPU the few that are left go row block by row block, within the cache:
    together four times as fast as whole, where they took longer than the head's matrix product.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalisers = (torch.empty(len(logits), device=logits.device) for _ in range(3))
        for rows, scaled in _row_blocks(logits, temperature):
            highest = scaled.amax(-1, keepdim=True)
            picked = scaled.gather(-1, targets[rows, None])[:, 0]
            weights = torch.exp(scaled - highest)
            total = weights.sum(-1)
            normalisers[rows] = highest[:, 0] + total.log()
            logprobs[rows] = picked - normalisers[rows]
            entropies[rows] = normalisers[rows] - torch.linalg.vecdot(weights, scaled) / total
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """d logprob / d logits = (onehot - softmax) / temperature."""
        logits, targets, normalisers = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        out = torch.empty_like(logits)
        for rows, scaled in _row_blocks(logits, ctx.temperature):
            scaled.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows]).scatter_add_(-1, targets[rows, None], grad[rows])
            out[rows] = scaled.to(out.dtype)
        return out, None, None


def _row_blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yields `(rows, logits[rows] / temperature)` in float32, in one buffer that is used again."""
    size = min(len(logits), max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else 2**20)  # on a CPU 4 MB
    buffer = torch.empty(size, logits.shape[1], device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        scaled = buffer[: rows.stop - start].copy_(logits[rows])
        yield rows, scaled if temperature == 1 else scaled.div_(temperature)


def _scatter(pieces: list[Tensor], mask: Tensor) -> Tensor:
    """Returns a float32 [B, T] grid with the pieces' values, in order, where the mask is set."""
    grid = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return grid.masked_scatter(mask, torch.cat(pieces)) if pieces else grid
