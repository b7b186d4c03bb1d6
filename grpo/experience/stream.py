"""Asynchronous rollouts: samples and scores groups while the learner updates.

Groups are used in the order in which they were started. A group that finishes early waits for the
groups before it, so short completions are not over-represented in the updates, and the weights that
sampled a group are at most `train.max_staleness` versions old when it is used. The engine's weights
can change while a completion is sampled: each token carries the version that sampled it
(PipelineRL 2509.19128).

A checkpoint contains the finished groups that are not used yet. Unfinished groups, and groups with
undecided completions, are started again after a resume.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from grpo.engines import EngineError, Request
from grpo.experience.undecided import is_undecided
from grpo.types import Completion, Problem, ScoredGroup

POLL_S = 0.2  # longest time between two calls of `on_wait` while `take` waits


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCallbacks:
    """The functions that a stream calls.

    Attributes:
        draw: Returns the next problem.
        request: Returns the request for a problem, given the group's number in the stream.
        begin: Starts a request in the engine and returns a future of its completions.
        finish: Scores a group. Called in the stream's own thread.
        on_wait: Called at least every POLL_S seconds while `take` waits. May raise an exception.
        engine_idle_s: Returns the seconds that the engine was idle since the last call.
    """

    draw: Callable[[], Problem]
    request: Callable[[Problem, int], Request]
    begin: Callable[[Request], Future[tuple[Completion, ...]]]
    finish: Callable[[Problem, Request, tuple[Completion, ...]], ScoredGroup]
    on_wait: Callable[[], None]
    engine_idle_s: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """The limits of a stream.

    Attributes:
        num_ahead: Number of unused groups, finished or not, that the stream maintains.
        num_groups: Number of groups that the run uses in total; None if it is unknown.
        timeout_s: Longest wait of `take` in seconds (`engine.timeout_s`).
    """

    num_ahead: int
    num_groups: int | None
    timeout_s: float


@dataclass(slots=True, eq=False)
class _StreamGroup:
    """A group that is started and not used yet. `scored` is None until it is finished."""

    number: int  # position in the run's order of groups, from 0
    problem: Problem
    scored: ScoredGroup | None = None
    # Both are None if the finished group comes from a checkpoint.
    request: Request | None = None
    future: Future[tuple[Completion, ...]] | None = None


class Stream:
    """Samples and scores groups ahead of the learner and returns them in the order of their start.

    The training loop's thread calls the public methods; a second thread scores the groups.
    """

    def __init__(self, callbacks: StreamCallbacks, limits: StreamLimits) -> None:
        """Starts the scoring thread. No group is started before `take` or `load`."""
        self._callbacks = callbacks
        self._limits = limits
        self._groups: list[_StreamGroup] = []  # in the order of their numbers
        self._next_number = 0
        # Guards all state. Notified when a group is scored and when the scoring thread fails.
        self._changed = threading.Condition()
        self._failure: BaseException | None = None  # the first exception of the scoring thread
        self._is_closed = False
        # Groups whose requests are finished; None ends the scoring thread.
        self._sampled: queue.SimpleQueue[_StreamGroup | None] = queue.SimpleQueue()
        self._scoring_thread = threading.Thread(
            target=self._score_sampled_groups, daemon=True, name="stream"
        )
        self._scoring_thread.start()

    def take(self, count: int) -> list[ScoredGroup]:
        """Returns the next `count` groups and starts new groups in their place.

        Raises:
            EngineError: The groups are not finished within `timeout_s`.
            BaseException: The exception that a request, the scoring of a group or `on_wait` raised.
        """
        deadline = time.monotonic() + self._limits.timeout_s
        with self._changed:
            self._start_groups(min_groups=count)
            while self._num_unfinished(count):
                self._callbacks.on_wait()
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{self._num_unfinished(count)} of the next {count} groups were not "
                        f"sampled and scored within engine.timeout_s={self._limits.timeout_s:g} s"
                    )
                self._changed.wait(POLL_S)
            taken = self._groups[:count]
            self._groups = self._groups[count:]
            self._start_groups(min_groups=0)
        # All of them are scored. The condition is for the type checker.
        return [group.scored for group in taken if group.scored is not None]

    def _num_unfinished(self, count: int) -> int:
        return sum(group.scored is None for group in self._groups[:count])

    def engine_idle_s(self) -> float:
        """Returns the seconds that the engine was idle since the last call."""
        return self._callbacks.engine_idle_s()

    def depths(self) -> dict[str, float]:
        """Returns the `queue/` metrics: the numbers of finished and of unfinished groups."""
        with self._changed:
            num_ready = float(sum(group.scored is not None for group in self._groups))
            return {"queue/ready": num_ready, "queue/in_flight": len(self._groups) - num_ready}

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: the next number and all groups that are not used.

        Problems and scored groups are objects; grpo/run/directory.py writes them as JSON.
        """
        with self._changed:
            items = [
                {"number": group.number, "problem": group.problem, "scored": group.scored}
                for group in self._groups
            ]
            return {"number": self._next_number, "items": items}

    def load(
        self, state: dict[str, Any], parse_scored_group: Callable[[dict[str, Any]], ScoredGroup]
    ) -> None:
        """Restores a checkpoint's state.

        Finished groups are used as they are. Unfinished groups are started again, with the same
        numbers and therefore the same seeds. So are groups with undecided completions, because
        their cause may no longer exist.
        """
        with self._changed:
            self._next_number = state["number"]
            for row in state["items"]:
                group = _StreamGroup(number=row["number"], problem=Problem(**row["problem"]))
                self._groups.append(group)
                if row["scored"]:
                    scored = parse_scored_group(row["scored"])
                    if not any(map(is_undecided, scored.verdicts)):
                        group.scored = scored
                if group.scored is None:
                    self._start(group)

    def close(self) -> None:
        """Cancels the unfinished groups and waits at most 5 s for the end of the scoring thread."""
        with self._changed:
            self._is_closed = True
            for group in self._groups:
                if group.future is not None:
                    group.future.cancel()
        self._sampled.put(None)
        self._scoring_thread.join(timeout=5)

    def _start_groups(self, min_groups: int) -> None:
        """Starts groups up to `min_groups`, and beyond up to `num_ahead` if the run needs them."""
        while len(self._groups) < min_groups or self._needs_group_ahead():
            group = _StreamGroup(number=self._next_number, problem=self._callbacks.draw())
            self._next_number += 1
            self._groups.append(group)
            self._start(group)

    def _needs_group_ahead(self) -> bool:
        num_groups = self._limits.num_groups
        if num_groups is not None and self._next_number >= num_groups:
            return False
        return len(self._groups) < self._limits.num_ahead

    def _start(self, group: _StreamGroup) -> None:
        group.request = self._callbacks.request(group.problem, group.number)
        group.future = self._callbacks.begin(group.request)
        group.future.add_done_callback(lambda _: self._sampled.put(group))

    def _score_sampled_groups(self) -> None:
        """Runs in the scoring thread: scores each group when its request is finished."""
        while True:
            group = self._sampled.get()
            if group is None:
                return
            assert group.future is not None
            if not self._is_closed and not group.future.cancelled():
                self._score(group, group.future)

    def _score(self, group: _StreamGroup, future: Future[tuple[Completion, ...]]) -> None:
        try:
            assert group.request is not None
            scored = self._callbacks.finish(group.problem, group.request, future.result())
        except BaseException as error:
            with self._changed:
                if self._failure is None:
                    self._failure = error
                self._changed.notify_all()
            return
        with self._changed:
            group.scored = scored
            self._changed.notify_all()
