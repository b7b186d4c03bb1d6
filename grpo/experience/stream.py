"""Asynchronous rollouts.

Groups are sampled and scored while the learner updates; each is used in the order in which it was
begun.

First begun, first used: whatever finishes early waits its turn, so short completions are not
learned from more often than long ones, and a group is at most `max_staleness` versions old when it
is used. Weights change in flight; each token tells which sampled it (PipelineRL 2509.19128). What
is finished and not used is part of the checkpoint, what is in flight is begun again after a resume.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo.engines import EngineError, Request
from grpo.types import Completion, Problem, ScoredGroup


@dataclass(slots=True, eq=False)
class _Item:
    number: int  # of the run's groups, as they were begun
    problem: Problem
    scored: ScoredGroup | None = None
    request: Request | None = None
    future: Any = None


class Stream:
    """Samples and scores groups ahead of the learner; they are used in the order of their start."""

    def __init__(
        self,
        *,
        begin: Callable[[Request], Any],
        request: Callable[[Problem, int], Request],
        finish: Callable[[Problem, Request, tuple[Completion, ...]], ScoredGroup],
        draw: Callable[[], Problem],
        ahead: int,
        last: int | None,
        timeout_s: float,
        on_wait: Callable[[], None],
        idle: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Starts the thread that scores.

        Args:
            begin: starts a request and returns a future of its completions.
            request: makes the request of a problem and its number in the stream.
            finish: scores a group, in a thread of ours.
            draw: gives the next problem.
            ahead: groups that are begun and not used.
            last: how many groups the run needs, if that is known.
            timeout_s: longest wait for a group.
            on_wait: called five times a second while `take` waits; may raise.
            idle: the engine's idle seconds since asked.
        """
        self._begin, self._request, self._finish, self._draw = begin, request, finish, draw
        self._ahead, self._last, self._timeout_s, self._on_wait = ahead, last, timeout_s, on_wait
        self.idle = idle
        self._items: list[_Item] = []
        self._number = 0
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._ended = False
        self._arrived: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._scorer = threading.Thread(target=self._score, daemon=True, name="stream")
        self._scorer.start()

    def take(self, count: int) -> list[ScoredGroup]:
        """Returns the `count` groups that were begun first, and begins as many more.

        Raises what a reward or an engine raised.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            self._fill(count)
            while not all(item.scored for item in self._items[:count]):
                self._on_wait()
                if self._failed:
                    raise self._failed
                if time.monotonic() > deadline:
                    missing = sum(item.scored is None for item in self._items[:count])
                    raise EngineError(
                        f"{missing} of the {count} groups to learn from next were not there "
                        f"within {self._timeout_s:g} s"
                    )
                self._changed.wait(0.2)
            taken, self._items = self._items[:count], self._items[count:]
            self._fill(0)
        return [item.scored for item in taken if item.scored]

    def depths(self) -> dict[str, float]:
        """Returns how many groups wait to be used, and how many are in flight."""
        with self._changed:
            ready = float(sum(item.scored is not None for item in self._items))
            return {"queue/ready": ready, "queue/in_flight": len(self._items) - ready}

    def state(self) -> dict[str, Any]:
        """Returns what a resume needs, in the order in which it is used.

        The values are those that a checkpoint writes (grpo/run/directory.py).
        """
        with self._changed:
            items = [
                {"number": item.number, "problem": item.problem, "scored": item.scored}
                for item in self._items
            ]
            return {"number": self._number, "items": items}

    def load(
        self, state: dict[str, Any], scored_group: Callable[[dict[str, Any]], ScoredGroup]
    ) -> None:
        """Takes up a checkpoint's state.

        What was finished is used, what was in flight is begun again, with its seeds.
        """
        with self._changed:
            self._number = state["number"]
            for row in state["items"]:
                item = _Item(
                    row["number"],
                    Problem(**row["problem"]),
                    row["scored"] and scored_group(row["scored"]),
                )
                self._items.append(item)
                if item.scored is None:
                    self._start(item)

    def close(self) -> None:
        """Cancels what is in flight and ends the thread that scores, waiting 5 s at most."""
        with self._changed:
            self._ended = True
            for item in self._items:
                if item.future is not None:
                    item.future.cancel()
        self._arrived.put(None)
        self._scorer.join(timeout=5)

    def _fill(self, least: int) -> None:
        while len(self._items) < max(least, self._ahead) and (
            self._last is None or self._number < self._last or len(self._items) < least
        ):
            item = _Item(self._number, self._draw())
            self._number += 1
            self._items.append(item)
            self._start(item)

    def _start(self, item: _Item) -> None:
        item.request = self._request(item.problem, item.number)
        item.future = self._begin(item.request)
        item.future.add_done_callback(lambda _: self._arrived.put(item))

    def _score(self) -> None:
        while (item := self._arrived.get()) is not None:
            if self._ended or item.future.cancelled():
                continue
            try:
                assert item.request is not None
                scored = self._finish(item.problem, item.request, item.future.result())
            except BaseException as error:
                with self._changed:
                    self._failed = self._failed or error
                    self._changed.notify_all()
                continue
            with self._changed:
                item.scored = scored
                self._changed.notify_all()
