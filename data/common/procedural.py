"""Problem sets that are drawn, not stored.

Problem i comes from (seed, i) alone, and train and test share no content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar, overload

from data.common.mixture import seeded, stable_hash
from grpo.types import Problem, UserError

T = TypeVar("T")
TRIES = 10_000  # draws before a set counts as impossible


class Procedural(Sequence[Problem]):
    """`size` problems, each made when it is asked for by `make(i)`."""

    def __init__(self, size: int, make: Callable[[int], Problem]) -> None:
        """`make(i)` returns problem i of `size`, the same each time."""
        self._size = size
        self._make = make

    def __len__(self) -> int:
        """Returns the number of problems."""
        return self._size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        """Makes and returns a problem, or a list of them. Raises IndexError."""
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"got index {index} in a set of {self._size}")
        return self._make(index % self._size)


def draw(
    draw_one: Callable[[Random], tuple[str, T] | None], name: str, split: str, *key: object
) -> T:
    """The first draw that falls into `split`.

    `draw_one` returns (canonical content, value), or None to draw again.

    The content decides the split, whatever the seed: one tenth of all contents is test. Raises
    UserError when no draw fits.
    """
    random = seeded(name, split, *key)
    for _ in range(TRIES):
        drawn = draw_one(random)
        if drawn is not None and (stable_hash(f"{name}/{drawn[0]}") % 10 == 0) == (split == "test"):
            return drawn[1]
    raise UserError(f"data.{name}: no {split} problem in {TRIES} draws; widen its options")


def check_range(name: str, option: str, value: int, low: int, high: int) -> None:
    """Raises UserError when an option is not an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"data.{name}.{option}: got {value!r}; give an integer in {low}..{high}")
