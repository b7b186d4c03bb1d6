"""Ulysses sequence parallelism (DeepSpeed-Ulysses 2309.14509, ALST 2506.13996).

`learner.sequence_parallel` neighboring ranks share the packed stream of a micro-batch. In linear
layers, norms and the output head, each rank has a slice of the stream. In attention, each rank has
the complete stream for a part of the heads. The activations that a long sequence keeps for the
backward pass are therefore distributed over the ranks. The results are summed into complete
[B, T] tensors on every rank, so a loss may combine all tokens of a sequence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.learning import packing
from grpo.run import ranks
from grpo.types import UserError


class LocalSlice(NamedTuple):
    """This rank's slice of a packed stream."""

    layout: packing.Layout  # with the `ids`, `positions` and `predictors` of the slice only
    is_local: Tensor  # [N] bool: which predictors of the complete stream are in the slice


class Ulysses:
    """Splits packed streams across `size` neighboring ranks."""

    def __init__(self, model: Any, size: int) -> None:
        """Creates the process group and DeepSpeed's attention for it.

        Args:
            model: a transformers model; its config gives the numbers of heads.
            size: ranks per stream.

        Raises:
            UserError: `size` does not divide the number of ranks, or the attention cannot be split
                across `size` ranks.
        """
        _check_divisible(model, size)
        config = model.config
        num_heads = config.num_attention_heads
        num_kv_heads = config.num_key_value_heads
        head_size = getattr(config, "head_dim", None)
        if not head_size:
            head_size = config.hidden_size // num_heads
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self._size = size
        self._group = _neighbours(size)
        self._rank_in_group = ranks.rank() % size
        self._attention = UlyssesSPAttentionHF(
            packing.attend,
            batch_size=1,
            attn_head_count=num_heads,
            attn_head_size=head_size,
            kv_head_count=num_kv_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def local_slice(self, layout: packing.Layout) -> LocalSlice:
        """Returns this rank's slice of the stream.

        The slices of all ranks have the same length. Padding follows the end of the stream.

        Args:
            layout: layout of the complete stream of T tokens.
        """
        num_tokens = layout.ids.shape[1]
        slice_length = math.ceil(num_tokens / self._size)
        start = self._rank_in_group * slice_length
        end = start + slice_length
        num_padding = slice_length * self._size - num_tokens
        is_local = (layout.predictors >= start) & (layout.predictors < end)  # [N]
        local_layout = replace(
            layout,
            ids=F.pad(layout.ids, (0, num_padding))[:, start:end],
            positions=F.pad(layout.positions, (0, num_padding))[:, start:end],
            predictors=layout.predictors[is_local] - start,
            attend_across_ranks=self._attend,
        )
        return LocalSlice(local_layout, is_local)

    def _attend(
        self, *arguments: Any, packed: packing.Layout, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention function of transformers for the slice of this rank.

        DeepSpeed exchanges slices of the stream for heads before the attention, and back after it.
        """
        options["position_ids"] = packed.positions
        # DeepSpeed calls `packing.attend` with the complete stream. Without this replacement,
        # `packing.attend` would call this method again.
        layout = replace(packed, attend_across_ranks=None)
        attended: tuple[Tensor, None] = self._attention(*arguments, packed=layout, **options)
        return attended

    def sum_over_ranks(self, grid: Tensor) -> Tensor:
        """Returns the sum of the ranks' tensors [B, T].

        The tensor of a rank holds the values of its own slice and 0 elsewhere.
        """
        summed: Tensor = _Sum.apply(grid, self._group)  # type: ignore[no-untyped-call]
        return summed


class _Sum(torch.autograd.Function):
    """Sum over the ranks of a group, with the identity as its gradient.

    All ranks compute the same loss from the sum, so the gradient is complete on every rank. Summing
    it over the ranks would multiply it by their number.
    """

    @staticmethod
    def forward(ctx: Any, grid: Tensor, group: Any) -> Tensor:
        total = grid.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def create_ulysses(model: Any, size: int) -> Ulysses | None:
    """Returns the `Ulysses` of a model, `None` if streams are not shared (`size` 1)."""
    if size == 1:
        return None
    return Ulysses(model, size)


def _check_divisible(model: Any, size: int) -> None:
    if ranks.world_size() % size:
        raise UserError(
            f"learner.sequence_parallel={size} does not divide the {ranks.world_size()} ranks. "
            "Choose a divisor of the number of ranks."
        )
    config = model.config
    model_class = type(model).__name__
    if getattr(config, "kv_lora_rank", None):
        raise UserError(
            f"learner.sequence_parallel={size} does not support the latent attention of "
            f"{model_class}. Set it to 1."
        )
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise UserError(
            f"learner.sequence_parallel={size} cannot split the {num_heads} query heads and "
            f"{num_kv_heads} key-value heads of {model_class}. It must divide the query heads, and "
            "it must divide the key-value heads or be a multiple of them."
        )


@functools.cache
def _neighbours(size: int) -> Any:
    """Returns the process group of the `size` neighboring ranks to which this rank belongs.

    Every rank creates the groups of all ranks, as `new_group` requires.
    """
    groups = [
        torch.distributed.new_group(list(range(start, start + size)))
        for start in range(0, ranks.world_size(), size)
    ]
    return groups[ranks.rank() // size]
