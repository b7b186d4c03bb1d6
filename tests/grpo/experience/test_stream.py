"""Asynchronous rollouts.

First begun, first used; nothing is lost, nothing twice, nothing too old.
"""

import json
import random
import threading
import time
from concurrent.futures import Future

import pytest

from grpo.engines import EngineError, Request
from grpo.experience.describing import advantage_histogram, staleness
from grpo.experience.selection import scored_group
from grpo.experience.stream import Stream, StreamCallbacks, StreamLimits
from grpo.run import directory
from grpo.types import Completion, Group, Problem, Sample, ScoredGroup


class Engine:
    """Finishes what was begun in a random order, a little later.

    Notes the version that each was begun with.
    """

    def __init__(self, seed=0, wait=0.002):
        self.version, self.begun, self.random, self.wait = 1, [], random.Random(seed), wait

    def begin(self, request):
        self.begun.append((request.seed, self.version))
        future, version = Future(), self.version
        threading.Timer(
            self.random.random() * self.wait, self.finish, (future, request, version)
        ).start()
        return future

    def finish(self, future, request, version):
        if future.set_running_or_notify_cancel():
            spans = (
                ((version, 0, 1), (self.version, 1, 2))
                if self.version > version
                else ((version, 0, 2),)
            )
            future.set_result(
                (
                    Completion(
                        token_ids=(1, 2),
                        logprobs=(0.0, 0.0),
                        text="",
                        finish_reason="stop",
                        versions=spans,
                    ),
                )
            )


def stream(engine, ahead=8, num_groups=None, finish=None, first_problem=0, timeout_s=5):
    problems = iter(range(first_problem, 10**6))

    def scored(problem, request, completions):
        group = Group(problem=problem, prompt_ids=request.prompt_ids, completions=completions)
        return ScoredGroup(group=group, rewards=(1.0,), parts=({},), verdicts=(None,), faults=({},))

    callbacks = StreamCallbacks(
        draw=lambda: Problem(id=str(next(problems)), question="", answer="", source=""),
        request=lambda problem, number: Request(prompt_ids=(7,), seed=number),
        begin=engine.begin,
        finish=finish or scored,
        on_wait=lambda: None,
        engine_idle_s=lambda: 0.0,
    )
    limits = StreamLimits(num_ahead=ahead, num_groups=num_groups, timeout_s=timeout_s)
    return Stream(callbacks, limits)


def ids(groups):
    return [int(scored.group.problem.id) for scored in groups]


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_groups_are_used_in_the_order_in_which_they_were_begun_and_never_too_old(bound):
    engine = Engine()
    flow = stream(engine, ahead=4 * bound)
    used = []
    for step in range(12):
        groups = flow.take(4)
        assert staleness(groups, engine.version)["staleness/max"] <= bound
        used += ids(groups)
        engine.version += 1
        time.sleep(0.001 * (step % 3))
    flow.close()
    assert used == list(range(48))
    assert [seed for seed, _ in engine.begun] == list(range(48 + 4 * bound))


def test_while_the_learner_updates_the_engine_has_something_to_do():
    engine = Engine()
    flow = stream(engine, ahead=4)
    flow.take(4)
    time.sleep(0.1)
    assert flow.depths() == {"queue/ready": 4, "queue/in_flight": 0}  # sampled and scored meanwhile
    flow.close()


def test_a_resume_uses_what_was_finished_and_begins_again_what_was_not():
    engine = Engine(wait=0.05)
    flow = stream(engine)
    first = ids(flow.take(4))
    state = json.loads(json.dumps(flow.state(), default=directory._fields))
    flow.close()
    finished = {row["number"] for row in state["items"] if row["scored"]}
    assert len(state["items"]) == 8
    again = Engine(seed=1)
    flow = stream(again, first_problem=12)
    flow.load(state, scored_group)
    assert first + ids(flow.take(4)) + ids(flow.take(8)) == list(range(16))
    flow.close()
    assert not finished & {seed for seed, _ in again.begun}  # and not a second time
    assert {row["number"] for row in state["items"]} - finished <= {seed for seed, _ in again.begun}


def test_no_more_is_begun_than_the_run_needs():
    engine = Engine()
    flow = stream(engine, ahead=8, num_groups=12)
    assert ids(flow.take(4)) + ids(flow.take(4)) + ids(flow.take(4)) == list(range(12))
    assert len(engine.begun) == 12
    flow.close()


def test_a_failing_reward_and_a_lost_engine_reach_the_loop():
    flow = stream(Engine(), finish=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flow.take(4)
    flow.close()
    silent = Engine()
    silent.begin = lambda request: Future()
    flow = stream(silent, timeout_s=0.3)
    with pytest.raises(
        EngineError,
        match=r"4 of the next 4 groups were not sampled and scored within engine.timeout_s=0\.3 s",
    ):
        flow.take(4)
    flow.close()


def test_staleness_counts_tokens_by_the_age_of_their_weights():
    completion = Completion(
        token_ids=(1,) * 5,
        logprobs=(0.0,) * 5,
        text="",
        finish_reason="stop",
        versions=((3, 0, 2), (4, 2, 5)),
    )
    problem = Problem(id="0", question="", answer="", source="")
    group = ScoredGroup(
        group=Group(problem=problem, prompt_ids=(1,), completions=(completion,)),
        rewards=(1.0,),
        parts=({},),
        verdicts=(None,),
        faults=({},),
    )
    assert staleness([group], 5) == {
        "staleness/mean": (2 * 2 + 3 * 1) / 5,
        "staleness/max": 2.0,
        "histogram/staleness": [0, 3, 2],
    }


def test_advantages_are_counted_by_completion():
    values = [(1.0, 1.0), (-1.0,), (), (0.2, -0.2), (9.0,), (float("-inf"),), (float("nan"),)]
    bins = advantage_histogram(
        [Sample(token_ids=(1,), prompt_length=1, advantages=advantages) for advantages in values]
    )
    assert len(bins) == 17 and {(i - 8) / 2: count for i, count in enumerate(bins) if count} == {
        -4: 1,
        -1: 1,
        0: 1,
        1: 1,
        4: 1,
    }
