"""The micro-batches of supervised training with TRL, sized by the real lengths of the texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

from torch.utils.data import Sampler

from grpo.learning.batch import MicroBatchPart, split_padded


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the rows of one micro-batch after the other, as `batch_sampler` of a DataLoader.

    transformers' Trainer accumulates the gradients of a fixed number of micro-batches. This number
    is the smallest with which every update of the run fits `max_tokens` per micro-batch. The
    micro-batches of the other updates are a little smaller.

    With several ranks, accelerate gives each rank one of `num_ranks` consecutive micro-batches.
    They have about the same number of tokens.

    Attributes:
        batch_size: None: the number of rows per micro-batch differs. accelerate reads it.
        num_per_update: Number of micro-batches per update and rank.
    """

    batch_size = None

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows_per_update: int,
        max_tokens: int,
        packed: bool,
        num_ranks: int = 1,
    ) -> None:
        """Splits all updates into micro-batches.

        Args:
            lengths: Number of tokens of each row, in the order of training. Each is at most
                `max_tokens`.
            rows_per_update: Number of rows per update on all ranks; a multiple of `num_ranks`.
            max_tokens: Maximum number of tokens of a micro-batch, including padding.
            packed: Whether a micro-batch is one sequence without padding.
            num_ranks: Number of ranks that train.
        """
        self._num_ranks = num_ranks
        split = _split_packed if packed else split_padded
        self._updates: list[list[MicroBatchPart]] = []
        for first in range(0, len(lengths), rows_per_update):
            parts = split(lengths[first : first + rows_per_update], max_tokens)
            for part in parts:
                part.indices = [first + i for i in part.indices]
            self._updates.append(parts)
        self.num_per_update = max(math.ceil(len(parts) / num_ranks) for parts in self._updates)
        for parts in self._updates:
            _split_further(parts, self.num_per_update * num_ranks, lengths, packed=packed)
            parts.sort(key=attrgetter("num_tokens"), reverse=True)

    def __len__(self) -> int:
        """Returns the number of micro-batches of the whole run, on all ranks."""
        return len(self._updates) * self.num_per_update * self._num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the rows of each micro-batch of the run."""
        for update in range(len(self._updates)):
            for micro_batches in self.rounds(update):
                yield from micro_batches

    def rounds(self, update: int) -> Iterator[list[list[int]]]:
        """Yields the micro-batches that the ranks compute at the same time, one for each rank.

        The rows of a micro-batch are in the order of training.

        Args:
            update: Number of the update, from 0.
        """
        parts = self._updates[update]
        for number in range(self.num_per_update):
            first = number * self._num_ranks
            rows = [sorted(part.indices) for part in parts[first : first + self._num_ranks]]
            # The order alternates. Otherwise rank 0 would get the longest of each round.
            yield rows if number % 2 == 0 else rows[::-1]


def _split_packed(lengths: Sequence[int], max_tokens: int) -> list[MicroBatchPart]:
    """Puts each row, longest first, into the first micro-batch that has room for it."""
    parts: list[MicroBatchPart] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for part in parts:
            if part.num_tokens + lengths[i] <= max_tokens:
                part.indices.append(i)
                part.num_tokens += lengths[i]
                break
        else:
            parts.append(MicroBatchPart(indices=[i], num_tokens=lengths[i]))
    return parts


def _split_further(
    parts: list[MicroBatchPart], count: int, lengths: Sequence[int], *, packed: bool
) -> None:
    """Halves the largest micro-batches that have several rows until there are `count`."""
    while len(parts) < count:
        part = max((part for part in parts if len(part.indices) > 1), key=attrgetter("num_tokens"))
        parts.remove(part)
        middle = len(part.indices) // 2
        for indices in (part.indices[:middle], part.indices[middle:]):
            row_lengths = [lengths[i] for i in indices]
            num_tokens = sum(row_lengths) if packed else len(indices) * max(row_lengths)
            parts.append(MicroBatchPart(indices=indices, num_tokens=num_tokens))
