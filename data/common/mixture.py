"""Determines the order of a run's problems: the problem at each position of the stream.

The order is a pure function of (seed, position), so a resumed run restores no state. Several
sources are interleaved in blocks of 1000 positions. In each block a source has its share of the
positions, rounded to a whole number. Each source is traversed in permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from random import Random
from typing import NamedTuple

from grpo.types import Problem, UserError

BLOCK = 1000  # positions per block


def seeded_random(*key: object) -> Random:
    """Returns a random generator that is seeded by `key`, equally in every process and machine."""
    return Random(stable_hash("/".join(str(part) for part in key)))


def stable_hash(text: str) -> int:
    """Returns a 64-bit hash of `text` that is the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def positions_per_block(weights: Mapping[str, float]) -> dict[str, int]:
    """Returns the number of positions per block for each source, by the largest remainder method.

    Every source gets at least one position. Example: `{"a": 2, "b": 1}` -> `{"a": 667, "b": 333}`.
    """
    total = sum(Fraction(weight) for weight in weights.values())
    exact = {name: Fraction(weight) * BLOCK / total for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    num_unassigned = BLOCK - sum(counts.values())
    while num_unassigned != 0:
        step = 1 if num_unassigned > 0 else -1
        # How far each count is from its exact share, in the direction of the step.
        deviations = {
            name: step * (exact[name] - counts[name]) for name in counts if counts[name] + step >= 1
        }
        name = max(deviations, key=deviations.__getitem__)
        counts[name] += step
        num_unassigned -= step
    return counts


class _Slot(NamedTuple):
    """A position of a block: its source, and how many slots of the source precede it."""

    source: str
    num_before: int


class _Block(NamedTuple):
    number: int
    slots: list[_Slot]


class _Epoch(NamedTuple):
    number: int
    permutation: list[int]


class Mixture:
    """An endless stream of problems from one or more sources.

    `Mixture({"gsm8k": problems}, {"gsm8k": 1.0}, seed=0)[position]` is the problem at a position.

    Each source is traversed in epochs. An epoch is a permutation of the source that is seeded by
    (seed, source name, epoch). Each block of 1000 positions has `positions_per_block` of each
    source, in an order that is seeded by (seed, block).
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Problem]],
        weights: Mapping[str, float],
        seed: int,
        curriculum: str | None = None,
    ) -> None:
        """Checks the sources, weights and curriculum.

        Args:
            sources: Problems by source name.
            weights: Relative share of each source, positive.
            seed: Seed of all permutations.
            curriculum: A numeric field of `Problem.meta`. The first epoch of each source is sorted
                by it, in ascending order.

        Raises:
            UserError: There is no source or more than 1000, a source is empty, a weight is not
                positive, the names of sources and weights differ, or the curriculum field of a
                problem is not a number.
        """
        _check_sources(sources, weights)
        if curriculum:
            _check_curriculum(sources, curriculum)
        self._sources = dict(sources)
        self._block_counts = positions_per_block(weights)
        self._seed = seed
        self._curriculum = curriculum
        # Caches: the last block, and the last permutation of each source.
        self._block = _Block(-1, [])
        self._epochs: dict[str, _Epoch] = {}

    def __getitem__(self, position: int) -> Problem:
        """Returns the problem at a position, counted from 0.

        Raises:
            IndexError: The position is negative.
        """
        if position < 0:
            raise IndexError(f"got position {position}; the stream starts at 0")
        block, offset = divmod(position, BLOCK)
        slot = self._slots(block)[offset]
        source = self._sources[slot.source]
        source_position = block * self._block_counts[slot.source] + slot.num_before
        epoch, index = divmod(source_position, len(source))
        return source[self._permutation(slot.source, epoch)[index]]

    def take(self, position: int, count: int) -> list[Problem]:
        """Returns the problems at `position` to `position + count - 1`."""
        return [self[position + offset] for offset in range(count)]

    def _slots(self, block: int) -> list[_Slot]:
        if self._block.number != block:
            self._block = _Block(block, self._shuffled_slots(block))
        return self._block.slots

    def _shuffled_slots(self, block: int) -> list[_Slot]:
        names: list[str] = []
        for name in sorted(self._block_counts):
            names += [name] * self._block_counts[name]
        seeded_random(self._seed, "block", block).shuffle(names)
        counts = dict.fromkeys(self._block_counts, 0)
        slots = []
        for name in names:
            slots.append(_Slot(name, counts[name]))
            counts[name] += 1
        return slots

    def _permutation(self, name: str, epoch: int) -> list[int]:
        """Returns the order of a source's problems in one epoch."""
        cached = self._epochs.get(name)
        if cached is None or cached.number != epoch:
            cached = _Epoch(epoch, self._new_permutation(name, epoch))
            self._epochs[name] = cached
        return cached.permutation

    def _new_permutation(self, name: str, epoch: int) -> list[int]:
        source = self._sources[name]
        permutation = list(range(len(source)))
        seeded_random(self._seed, "epoch", name, epoch).shuffle(permutation)
        if self._curriculum and epoch == 0:
            field = self._curriculum
            permutation.sort(key=lambda index: source[index].meta[field])
        return permutation


def _check_sources(sources: Mapping[str, Sequence[Problem]], weights: Mapping[str, float]) -> None:
    if not sources:
        raise UserError("data: no sources, expected at least one")
    if sources.keys() != weights.keys():
        raise UserError(
            f"data: the weights name {', '.join(sorted(weights))}, but the sources are "
            f"{', '.join(sorted(sources))}. Set one weight per source."
        )
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(
                f"data.{name}: weight is {weight}, expected a positive number. To exclude the "
                "source, remove it from the config."
            )
        if len(sources[name]) == 0:
            raise UserError(f"data.{name}: no problems. Check its path and options.")
    if len(sources) > BLOCK:
        raise UserError(f"data: {len(sources)} sources, but at most {BLOCK} can be mixed")


def _check_curriculum(sources: Mapping[str, Sequence[Problem]], field: str) -> None:
    for name, source in sources.items():
        for problem in source:
            if not isinstance(problem.meta.get(field), (int, float)):
                raise UserError(
                    f"data.curriculum: problem {problem.id} of {name} has no number {field!r} in "
                    "its meta"
                )
