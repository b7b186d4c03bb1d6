"""Asynchronous rollouts: groups are sampled and scored while the learner updates.

Groups are used in the order in which they were begun. A group that finishes early waits its turn,
so short completions are not learned from more often than long ones, and a group is at most
`max_staleness` versions old when it is used. Weights change while a completion is sampled; each
token carries the version that sampled it (PipelineRL 2509.19128). Finished groups that are not used
are part of the checkpoint; unfinished ones are begun again after a resume.
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
            request: returns the request of a problem and its number in the stream.
            finish: scores a group; called in the stream's thread.
            draw: returns the next problem.
            ahead: how many groups are begun and not used.
            last: how many groups the run needs, None if that is not known.
            timeout_s: the longest wait for a group.
            on_wait: called five times a second while `take` waits; may raise.
            idle: returns for how many seconds since its last call the engine was idle.
        """
        self._begin = begin
        self._request = request
        self._finish = finish
        self._draw = draw
        self._ahead = ahead
        self._last = last
        self._timeout_s = timeout_s
        self._on_wait = on_wait
        self.idle = idle
        self._items: list[_Item] = []
        self._number = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
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
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() > deadline:
                    missing = sum(item.scored is None for item in self._items[:count])
                    raise EngineError(
                        f"{missing} of the {count} groups to learn from next were not there "
                        f"within {self._timeout_s:g} s"
                    )
                self._changed.wait(0.2)
            taken = self._items[:count]
            self._items = self._items[count:]
            self._fill(0)
        return [item.scored for item in taken if item.scored is not None]

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

    def _fill(self, min_items: int) -> None:
        """Begins groups until there are `min_items`, and beyond that as many as are needed ahead.

        Those ahead are `self._ahead`, less at the end of a run: it needs `self._last` groups.
        """
        while True:
            num_items = len(self._items)
            is_last_begun = self._last is not None and self._number >= self._last
            is_needed_ahead = num_items < self._ahead and not is_last_begun
            if num_items >= min_items and not is_needed_ahead:
                return
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
                    self._failure = self._failure or error
                    self._changed.notify_all()
                continue
            with self._changed:
                item.scored = scored
                self._changed.notify_all()
