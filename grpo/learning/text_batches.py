"""The micro-batches of supervised training with TRL, sized by the real lengths of the texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

from torch.utils.data import Sampler

from grpo.learning.batch import MicroBatchRows, split_padded


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the rows of each micro-batch, as `batch_sampler` of a DataLoader.

    transformers' Trainer accumulates the gradients of a fixed number of micro-batches. It is the
    number that the update with the most tokens needs, with `max_tokens` per micro-batch. In the
    other updates the micro-batches are smaller.

    With several ranks, accelerate gives each rank one of `num_ranks` consecutive micro-batches.

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
        padded: bool,
        num_ranks: int = 1,
    ) -> None:
        """Determines the number of micro-batches.

        Args:
            lengths: Number of tokens of each row, in the order of training. Each is at most
                `max_tokens`.
            rows_per_update: Number of rows per update on all ranks; a multiple of `num_ranks`.
            max_tokens: Maximum number of tokens of a micro-batch, including padding.
            padded: Whether the rows of a micro-batch are padded to the longest one.
            num_ranks: Number of ranks that train.
        """
        self._lengths = lengths
        self._rows_per_update = rows_per_update
        self._max_tokens = max_tokens
        self._padded = padded
        self._num_ranks = num_ranks
        self._num_updates = len(lengths) // rows_per_update
        counts = [
            len(self._split(self._lengths_of(update), max_tokens))
            for update in range(self._num_updates)
        ]
        self.num_per_update = math.ceil(max(counts) / num_ranks)

    def __len__(self) -> int:
        """Returns the number of micro-batches of the whole run, on all ranks."""
        return self._num_updates * self.num_per_update * self._num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the row numbers of each micro-batch of the run."""
        for update in range(self._num_updates):
            for micro_batches in self.rounds(update):
                yield from micro_batches

    def rounds(self, update: int) -> Iterator[list[list[int]]]:
        """Yields the micro-batches that the ranks compute at the same time, one for each rank.

        They have about the same number of tokens. Their rows are in the order of training.

        Args:
            update: Number of the update, from 0.
        """
        first_row = update * self._rows_per_update
        parts = self._even_parts(self._lengths_of(update))
        for first in range(0, len(parts), self._num_ranks):
            parts_of_round = parts[first : first + self._num_ranks]
            yield [sorted(first_row + i for i in part.indices) for part in parts_of_round]

    def _lengths_of(self, update: int) -> Sequence[int]:
        first_row = update * self._rows_per_update
        return self._lengths[first_row : first_row + self._rows_per_update]

    def _split(self, lengths: Sequence[int], max_tokens: int) -> list[MicroBatchRows]:
        """Returns few micro-batches of at most `max_tokens` tokens."""
        if self._padded:
            return split_padded(lengths, max_tokens)
        return _first_fit(lengths, max_tokens)

    def _even_parts(self, lengths: Sequence[int]) -> list[MicroBatchRows]:
        """Returns the micro-batches of an update on all ranks, about equally large, largest first.

        Bisection finds the smallest limit of tokens with which there are not too many (MULTIFIT,
        Coffman, Garey and Johnson 1978).
        """
        count = self.num_per_update * self._num_ranks
        low = max(lengths)
        high = self._max_tokens  # enough for every update
        while low < high:
            limit = (low + high) // 2
            if len(self._split(lengths, limit)) <= count:
                high = limit
            else:
                low = limit + 1
        parts = self._split(lengths, high)
        while len(parts) < count:
            parts = self._with_largest_halved(parts, lengths)
        return sorted(parts, key=attrgetter("num_tokens"), reverse=True)

    def _with_largest_halved(
        self, parts: Sequence[MicroBatchRows], lengths: Sequence[int]
    ) -> list[MicroBatchRows]:
        """Returns the micro-batches with one more: the largest of several rows is halved."""
        divisible = [part for part in parts if len(part.indices) > 1]
        largest = max(divisible, key=attrgetter("num_tokens"))
        middle = len(largest.indices) // 2
        result = [part for part in parts if part is not largest]
        for indices in (largest.indices[:middle], largest.indices[middle:]):
            row_lengths = [lengths[i] for i in indices]
            num_tokens = len(indices) * max(row_lengths) if self._padded else sum(row_lengths)
            result.append(MicroBatchRows(indices=indices, num_tokens=num_tokens))
        return result


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[MicroBatchRows]:
    """Puts each row, longest first, into the first micro-batch with room for it, unpadded."""
    parts: list[MicroBatchRows] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for part in parts:
            if part.num_tokens + lengths[i] <= max_tokens:
                part.indices.append(i)
                part.num_tokens += lengths[i]
                break
        else:
            parts.append(MicroBatchRows(indices=[i], num_tokens=lengths[i]))
    return parts
