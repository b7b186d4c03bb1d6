"""Which problem stands at which position of a run.

A pure function of (seed, position), so a resume needs no state.

Knows nothing of what a problem is about. Sources are interleaved in blocks with exact shares; each
goes through its own permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from random import Random

from grpo.types import Problem, UserError

BLOCK = 1000  # positions in which the shares of the sources are exact


def seeded(*parts: object) -> Random:
    """A generator that depends on `parts` alone, the same on every machine and in every process."""
    return Random(stable_hash("/".join(map(str, parts))))


def stable_hash(text: str) -> int:
    """64 bits of `text`, the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def shares(weights: Mapping[str, float], block: int = BLOCK) -> dict[str, int]:
    """Positions of one block for each source, by largest remainder.

    `{"a": 2, "b": 1}` -> `{"a": 667, "b": 333}`; never 0.
    """
    total = sum(map(Fraction, weights.values()))
    exact = {name: Fraction(weight) * block / total for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    while (missing := block - sum(counts.values())) != 0:  # fewer rounds than there are sources
        sign = 1 if missing > 0 else -1
        name = max(
            (name for name in counts if counts[name] + sign >= 1),
            key=lambda name: sign * (exact[name] - counts[name]),
        )
        counts[name] += sign
    return counts


class Mixture:
    """An endless stream over `sources`.

    `Mixture({"gsm8k": problems}, {"gsm8k": 1.0}, seed=0)[position] -> Problem`.

    Within a source each epoch is a permutation seeded by (seed, name, epoch); between sources each
    block of 1000 positions holds exact shares in an order seeded by (seed, block). With
    `curriculum`, a field of the problems' meta, each source's first epoch goes from its smallest
    value to its largest. Raises UserError for an empty source, a weight that is not positive, a
    missing field.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Problem]],
        weights: Mapping[str, float],
        seed: int,
        curriculum: str | None = None,
    ) -> None:
        """Checks sources and weights; see the class for what they mean."""
        if not sources:
            raise UserError("data: no sources; give at least one")
        if sources.keys() != weights.keys():
            raise UserError(
                f"data: weights for {', '.join(sorted(weights))} but sources "
                f"{', '.join(sorted(sources))}; give each one weight"
            )
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"data.{name}: weight is {weight}; give a positive number or leave the source "
                    "out"
                )
            if len(sources[name]) == 0:
                raise UserError(f"data.{name}: no problems; check its path and options")
        if len(sources) > BLOCK:
            raise UserError(f"data: {len(sources)} sources; at most {BLOCK} can be mixed")
        self._sources = dict(sources)
        self._shares = shares(weights)
        self._seed, self._curriculum = seed, curriculum
        if curriculum:
            for name, source in sources.items():
                bad = next(
                    (
                        problem.id
                        for problem in source
                        if not isinstance(problem.meta.get(curriculum), (int, float))
                    ),
                    None,
                )
                if bad:
                    raise UserError(
                        f"data.curriculum: problem {bad} of {name} has no number {curriculum!r} "
                        "in its meta"
                    )
        # the current block only, as a cache
        self._block: tuple[int, list[tuple[str, int]]] = (-1, [])
        # the current permutation of each source, as a cache
        self._epochs: dict[str, tuple[int, list[int]]] = {}

    def __getitem__(self, position: int) -> Problem:
        """Returns the problem at a position from 0 on. Raises IndexError for a negative one."""
        if position < 0:
            raise IndexError(f"got position {position}; the stream starts at 0")
        block, offset = divmod(position, BLOCK)
        name, rank = self._order(block)[offset]
        source = self._sources[name]
        epoch, index = divmod(block * self._shares[name] + rank, len(source))
        return source[self._permutation(name, epoch)[index]]

    def take(self, position: int, n: int) -> list[Problem]:
        """The n problems at `position`, `position + 1`, ..."""
        return [self[position + i] for i in range(n)]

    def _order(self, block: int) -> list[tuple[str, int]]:
        """Returns `(source, n)` for each position of the block.

        `n` is how many of that source stand before the position in the block.
        """
        if self._block[0] != block:
            names = [name for name in sorted(self._shares) for _ in range(self._shares[name])]
            seeded(self._seed, "block", block).shuffle(names)
            seen = dict.fromkeys(self._shares, -1)
            order = []
            for name in names:
                seen[name] += 1
                order.append((name, seen[name]))
            self._block = (block, order)
        return self._block[1]

    def _permutation(self, name: str, epoch: int) -> list[int]:
        if name not in self._epochs or self._epochs[name][0] != epoch:
            indices = list(range(len(self._sources[name])))
            seeded(self._seed, "epoch", name, epoch).shuffle(indices)
            if self._curriculum and epoch == 0:
                key = self._curriculum
                indices.sort(key=lambda i: self._sources[name][i].meta[key])
            self._epochs[name] = (epoch, indices)
        return self._epochs[name][1]
