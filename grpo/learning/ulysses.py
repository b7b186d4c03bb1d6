"""Ulysses sequence parallelism (DeepSpeed-Ulysses 2309.14509, ALST 2506.13996).

Neighbouring ranks share the stream of a micro-batch. For linear layers, norms and the head, each
rank has a slice of it. Within attention, each has all of it, for a share of the heads. So what a
long sequence leaves in memory for the backward pass is spread over the ranks. A loss sees whole
sequences on each of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.learning import packing
from grpo.run import ranks
from grpo.types import UserError


class Ulysses:
    """What a model needs to share streams among `size` ranks.

    Raises UserError for ranks or heads that cannot be shared out so.
    """

    def __init__(self, model: Any, size: int) -> None:
        """`model`: a transformers model, whose config gives the heads; `size`: ranks per stream."""
        shape = model.config
        heads, shared = shape.num_attention_heads, shape.num_key_value_heads
        width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
        if ranks.world_size() % size:
            raise UserError(
                f"learner.sequence_parallel={size} does not divide the {ranks.world_size()} ranks"
            )
        if (
            heads % size
            or (shared % size and size % shared)
            or getattr(shape, "kv_lora_rank", None)
        ):
            kind = type(model).__name__
            raise UserError(
                f"learner.sequence_parallel={size} cannot share out {kind}'s {heads} heads with "
                f"{shared} of keys and values"
            )
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self._group, self._place, self._size = _group(size), ranks.rank() % size, size
        self._attention = UlyssesSPAttentionHF(
            packing.attend,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=width,
            kv_head_count=shared,
            num_hidden_layers=shape.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def part(self, layout: packing.Layout) -> tuple[packing.Layout, Tensor]:
        """Returns this rank's part of the layout, and a mask [N] of the predictors in it.

        The part has this rank's ids, positions and predictors. The mask is over all N predictors.
        """
        length = layout.ids.shape[1]
        size = -(-length // self._size)
        first = self._place * size
        own = (layout.predictors >= first) & (layout.predictors < first + size)
        ids, positions = (
            F.pad(part, (0, size * self._size - length))[:, first : first + size]
            for part in (layout.ids, layout.positions)
        )
        return replace(
            layout,
            ids=ids,
            positions=positions,
            predictors=layout.predictors[own] - first,
            through=self._attend,
        ), own

    def _attend(self, *arguments: Any, packed: packing.Layout, **more: Any) -> tuple[Tensor, None]:
        more["position_ids"] = packed.positions
        attended: tuple[Tensor, None] = self._attention(
            *arguments, packed=replace(packed, through=None), **more
        )
        return attended

    def whole(self, grid: Tensor) -> Tensor:
        """Returns the sum of the ranks' grids [B, T], each 0 but where it is its own."""
        summed: Tensor = _Sum.apply(grid, self._group)  # type: ignore[no-untyped-call]
        return summed


class _Sum(torch.autograd.Function):
    """All ranks make the same loss of the sum, so each knows the gradient of its own places."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, group: Any) -> Tensor:
        total = grid.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def shared(model: Any, size: int) -> Ulysses | None:
    """Returns what a model needs to share streams among `size` ranks, None for one rank."""
    return Ulysses(model, size) if size > 1 else None


@functools.cache
def _group(size: int) -> Any:
    """Returns the process group of the `size` neighbours that this rank is one of.

    All ranks make all groups.
    """
    groups = [
        torch.distributed.new_group(list(range(first, first + size)))
        for first in range(0, ranks.world_size(), size)
    ]
    return groups[ranks.rank() // size]
