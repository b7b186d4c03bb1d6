"""Problem sets that are generated instead of stored.

Problem i is a function of (split, seed, i) and the options of the set. Train and test never share
content, for any pair of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Generic, NamedTuple, TypeVar, overload

from grpo.data.common.mixture import seeded_random, stable_hash
from grpo.types import Problem, UserError

T = TypeVar("T")
MAX_DRAWS = 10_000  # draws without a match after which the options are considered impossible


class GeneratedProblems(Sequence[Problem]):
    """A sequence of `size` problems. Each problem is generated when it is accessed."""

    def __init__(self, size: int, generate: Callable[[int], Problem]) -> None:
        """`generate(i)` returns problem i, the same problem for each call."""
        self._size = size
        self._generate = generate

    def __len__(self) -> int:
        """Returns the number of problems."""
        return self._size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        """Generates one problem, or a list of problems for a slice.

        Raises:
            IndexError: The index is out of range.
        """
        if isinstance(index, slice):
            return [self._generate(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"got index {index} in a set of {self._size} problems")
        return self._generate(index % self._size)


class Drawn(NamedTuple, Generic[T]):
    """A value drawn at random, and its content, which determines the split.

    `content` is a canonical text: values that are the same exercise have the same content, such as
    `"85+347"` for both 347+85 and 85+347.
    """

    content: str
    value: T


def draw_for_split(
    draw: Callable[[Random], Drawn[T] | None], name: str, split: str, *key: object
) -> T:
    """Returns the first drawn value that belongs to `split`.

    The split of a value depends only on its content, not on the seed: one tenth of all contents is
    in test.

    Args:
        draw: Draws one value; None if the draw is invalid and must be repeated.
        name: Name of the problem set.
        split: `train` or `test`.
        key: Seed, index and options; with name and split they seed the random generator.

    Raises:
        UserError: No value of the split within MAX_DRAWS draws.
    """
    random = seeded_random(name, split, *key)
    for _ in range(MAX_DRAWS):
        drawn = draw(random)
        if drawn is not None and _split_of(name, drawn.content) == split:
            return drawn.value
    raise UserError(
        f"data.{name}: no {split} problem in {MAX_DRAWS} draws. Widen the ranges of its options."
    )


def _split_of(name: str, content: str) -> str:
    is_test = stable_hash(f"{name}/{content}") % 10 == 0
    return "test" if is_test else "train"


def check_range(option: str, value: int, low: int, high: int) -> None:
    """Raises UserError if an option, such as `arithmetic.digits`, is no integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"data.{option}: got {value!r}, expected an integer from {low} to {high}")
