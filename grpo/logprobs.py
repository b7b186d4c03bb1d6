"""The policy as the learner sees it: tokens in, log-probabilities of the completion tokens out, never a [B, T, V] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `(logprobs, entropies)`, both [B, T] float32, 0 where `token_mask` is not set; entropies carry no gradient.

        Position t predicts `labels[:, t]`. Temperature divides the logits, as the sampler does before its softmax.
        """
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        states, targets = hidden[token_mask], labels[token_mask]  # [N, H], [N]
        logprobs, entropies = [], []
        for start in range(0, len(states), self.chunk):
            piece = slice(start, start + self.chunk)
            logprob, entropy = checkpoint(self._head, states[piece], targets[piece], use_reentrant=False)
            logprobs.append(logprob)
            entropies.append(entropy)
        return _scatter(logprobs, token_mask), _scatter(entropies, token_mask)

    def _head(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.get_output_embeddings()(states).float()  # [chunk, V]
        logits = logits if self.temperature == 1 else logits / self.temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        with torch.no_grad():
            entropies = normaliser - (logits.softmax(-1) * logits).sum(-1)
        return logprobs, entropies


def _scatter(pieces: list[Tensor], mask: Tensor) -> Tensor:
    """Returns a float32 [B, T] grid with the pieces' values, in order, where the mask is set."""
    grid = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return grid.masked_scatter(mask, torch.cat(pieces)) if pieces else grid
