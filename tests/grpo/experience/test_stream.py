"""Asynchronous rollouts: groups are used in the order in which they are started, each of them once,
and none is staler than the limit.
"""

import itertools
import json
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

from grpo.engines import EngineError, Request
from grpo.experience.group_metrics import advantage_histogram, staleness
from grpo.experience.selection import parse_scored_group
from grpo.experience.stream import Stream, StreamCallbacks, StreamLimits
from grpo.run import directory
from grpo.types import Completion, Group, Problem, Sample, ScoredGroup, Verdict


class ShuffledEngine:
    """An engine that finishes requests after a short random delay, so in a random order.

    `started` lists the seed of each request and the weight version at its start.
    """

    def __init__(self, seed=0, max_delay_s=0.002):
        self.version = 1
        self.started = []
        self.random = random.Random(seed)
        self.max_delay_s = max_delay_s

    def begin(self, request):
        self.started.append((request.seed, self.version))
        future = Future()
        delay_s = self.random.random() * self.max_delay_s
        threading.Timer(delay_s, self.finish, (future, self.version)).start()
        return future

    def finish(self, future, start_version):
        """Completes two tokens, the second one with new weights if they have changed since."""
        if not future.set_running_or_notify_cancel():
            return
        if self.version > start_version:
            versions = ((start_version, 0, 1), (self.version, 1, 2))
        else:
            versions = ((start_version, 0, 2),)
        completion = Completion(
            token_ids=(1, 2),
            logprobs=(0.0, 0.0),
            text="",
            finish_reason="stop",
            versions=versions,
        )
        future.set_result((completion,))

    @property
    def started_seeds(self):
        return [seed for seed, _ in self.started]


class SilentEngine(ShuffledEngine):
    """An engine that never finishes a request."""

    def begin(self, request):
        return Future()


def scored_with_one(problem, completions):
    """Returns a group of a single completion, which has the reward 1."""
    group = Group(problem=problem, prompt_ids=(7,), completions=completions)
    return ScoredGroup(group=group, rewards=(1.0,), parts=({},), verdicts=(None,), faults=({},))


def finish_with_one(problem, request, completions):
    return scored_with_one(problem, completions)


def raise_zero_division(problem, request, completions):
    raise ZeroDivisionError


def make_stream(
    engine, *, num_ahead=8, num_groups=None, finish=finish_with_one, first_problem=0, timeout_s=5
):
    """Returns a stream of the problems 0, 1, 2, ..., which scores each completion with 1."""
    problem_ids = itertools.count(first_problem)
    callbacks = StreamCallbacks(
        draw=lambda: Problem(id=str(next(problem_ids)), question="", answer="", source=""),
        request=lambda problem, number: Request(prompt_ids=(7,), seed=number),
        begin=engine.begin,
        finish=finish,
        on_wait=lambda: None,
        engine_idle_s=lambda: 0.0,
    )
    limits = StreamLimits(num_ahead=num_ahead, num_groups=num_groups, timeout_s=timeout_s)
    return Stream(callbacks, limits)


def problem_ids_of(groups):
    return [int(scored.group.problem.id) for scored in groups]


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_groups_are_used_in_the_order_of_their_start_and_within_the_staleness_limit(max_staleness):
    engine = ShuffledEngine()
    stream = make_stream(engine, num_ahead=4 * max_staleness)
    used = []
    for step in range(12):
        groups = stream.take(4)
        assert staleness(groups, engine.version)["staleness/max"] <= max_staleness
        used += problem_ids_of(groups)
        engine.version += 1
        time.sleep(0.001 * (step % 3))
    stream.close()
    assert used == list(range(48))
    assert engine.started_seeds == list(range(48 + 4 * max_staleness))


def test_the_stream_samples_and_scores_while_the_learner_updates():
    stream = make_stream(ShuffledEngine(), num_ahead=4)
    stream.take(4)
    time.sleep(0.1)  # the update
    assert stream.depths() == {"queue/ready": 4, "queue/in_flight": 0}
    stream.close()


def test_a_resume_uses_the_finished_groups_and_restarts_the_unfinished_ones():
    stream = make_stream(ShuffledEngine(max_delay_s=0.05))
    used = problem_ids_of(stream.take(4))
    state = json.loads(json.dumps(stream.state(), default=directory.dataclass_fields))
    stream.close()
    assert len(state["items"]) == 8
    finished = {item["number"] for item in state["items"] if item["scored"]}
    unfinished = {item["number"] for item in state["items"]} - finished

    engine = ShuffledEngine(seed=1)
    stream = make_stream(engine, first_problem=12)
    stream.load(state, parse_scored_group)
    used += problem_ids_of(stream.take(4))
    used += problem_ids_of(stream.take(8))
    stream.close()
    assert used == list(range(16))
    assert not finished & set(engine.started_seeds)
    assert unfinished <= set(engine.started_seeds)


def finish_undecided(problem, request, completions):
    scored = scored_with_one(problem, completions)
    return replace(scored, rewards=(None,), verdicts=(Verdict(value="undecided"),))


def test_a_resume_samples_groups_with_undecided_completions_again():
    stream = make_stream(ShuffledEngine(), num_ahead=2, finish=finish_undecided)
    assert [scored.rewards for scored in stream.take(2)] == [(None,), (None,)]
    while stream.depths()["queue/ready"] < 2:
        time.sleep(0.001)
    state = json.loads(json.dumps(stream.state(), default=directory.dataclass_fields))
    stream.close()

    stream = make_stream(ShuffledEngine(), num_ahead=2, first_problem=4)  # the cause is corrected
    stream.load(state, parse_scored_group)
    groups = stream.take(2)
    stream.close()
    assert problem_ids_of(groups) == [2, 3]
    assert [scored.rewards for scored in groups] == [(1.0,), (1.0,)]


def test_the_stream_starts_only_the_groups_that_the_run_needs():
    engine = ShuffledEngine()
    stream = make_stream(engine, num_ahead=8, num_groups=12)
    used = []
    for _ in range(3):
        used += problem_ids_of(stream.take(4))
    assert used == list(range(12))
    assert len(engine.started) == 12
    stream.close()


def test_take_raises_the_error_of_a_reward_and_times_out_if_the_engine_does_not_answer():
    stream = make_stream(ShuffledEngine(), finish=raise_zero_division)
    with pytest.raises(ZeroDivisionError):
        stream.take(4)
    stream.close()

    stream = make_stream(SilentEngine(), timeout_s=0.3)
    with pytest.raises(
        EngineError,
        match=r"4 of the next 4 groups were not sampled and scored within engine.timeout_s=0\.3 s",
    ):
        stream.take(4)
    stream.close()


def test_staleness_is_averaged_and_counted_by_token():
    completion = Completion(
        token_ids=(1,) * 5,
        logprobs=(0.0,) * 5,
        text="",
        finish_reason="stop",
        versions=((3, 0, 2), (4, 2, 5)),
    )
    problem = Problem(id="0", question="", answer="", source="")
    group = scored_with_one(problem, (completion,))
    # The weights have version 5: two tokens are 2 versions old, three tokens 1 version.
    assert staleness([group], 5) == {
        "staleness/mean": (2 * 2 + 3 * 1) / 5,
        "staleness/max": 2.0,
        "histogram/staleness": [0, 3, 2],
    }


def test_the_advantage_histogram_counts_completions_and_clamps_large_values():
    values = [(1.0, 1.0), (-1.0,), (), (0.2, -0.2), (9.0,), (float("-inf"),), (float("nan"),)]
    samples = [
        Sample(token_ids=(1,), prompt_length=1, advantages=advantages) for advantages in values
    ]
    bins = advantage_histogram(samples)
    assert len(bins) == 17
    counts = {(index - 8) / 2: count for index, count in enumerate(bins) if count}
    # 9 is counted as 4 and -inf as -4; no tokens and NaN are not counted.
    assert counts == {-4: 1, -1: 1, 0: 1, 1: 1, 4: 1}
