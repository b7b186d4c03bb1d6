"""Tests the diagnosis rules: each rule reports a run with its fault, no rule reports a healthy run,
and an alarm keeps a checkpoint or stops the run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from random_loop import make_loop

from grpo import config as configs
from grpo.config.sections import DIAGNOSIS_RULES
from grpo.metrics.diagnosis import RULES, Diagnosis, diagnose
from grpo.types import Problem, TrainingStoppedError, UserError, Verdict

# The metrics of one rollout of a healthy run.
HEALTHY = {
    "reward/mean": 0.5,
    "reward/accuracy": 0.45,
    "reward/format": 0.9,
    "reward/undecided": 0.0,
    "group/all_wrong": 0.2,
    "group/all_correct": 0.2,
    "group/no_signal": 0.4,
    "completion/truncated": 0.02,
    "completion/language": 1.0,
    "probe/gap_share": 0.3,
    "mismatch/abs": 0.03,
    "mismatch/effective": 0.98,
    "loss": 0.01,
    "update/made": 2.0,
    "policy/entropy": 1.0,
    "policy/grad_norm": 0.4,
    "clip/low": 0.01,
    "clip/high": 0.01,
    "kl/ref": 0.01,
    "time/rewards_s": 1.0,
    "time/total_s": 60.0,
}


def metrics_rows(num_rollouts=12, **changes):
    """Returns the rows of a healthy run with changed metrics.

    A change is a value or a function of the step: `kl__ref=3.0` sets `kl/ref` to 3 in every row.
    """
    rows = []
    for step in range(1, num_rollouts + 1):
        row = {"step": step, **HEALTHY, "reward/mean": 0.3 + 0.4 * step / num_rollouts}
        for name, change in changes.items():
            row[name.replace("__", "/")] = change(step) if callable(change) else change
        rows.append(row)
    return rows


# For each rule: the rows of a run with one fault, and a part of the reported text.
FAULTY_RUNS = {
    "too_hard": (
        metrics_rows(group__all_wrong=0.82, reward__undecided=0.08),
        "82% of groups are all wrong (8% undecided)",
    ),
    "too_easy": (metrics_rows(group__all_correct=0.9), "90% of groups are all correct"),
    "no_signal": (metrics_rows(group__no_signal=0.95), "95% of groups have equal rewards"),
    "undecided": (
        metrics_rows(reward__undecided=0.2, undecided__gold_answer=0.15, undecided__other=0.05),
        "20% of completions are undecided and have no reward (gold answer 15%, other 5%)",
    ),
    "truncated": (metrics_rows(completion__truncated=0.5), "50% of completions are truncated"),
    "stale_weights": (
        metrics_rows(probe__gap_share=lambda step: 0.3 if step < 8 else 0.8),
        "may be stale: the probe gap is 80% of the limit",
    ),
    "mismatch": (metrics_rows(mismatch__abs=0.4), "engine and learner disagree"),
    "zero_loss": (metrics_rows(loss=1e-9, update__made=1.0), "a loss near 0 is expected"),
    "entropy": (metrics_rows(policy__entropy=lambda step: 1.0 / step**2), "entropy is collapsing"),
    "clipped": (metrics_rows(clip__low=0.2, clip__high=0.15), "35% of tokens are clipped"),
    "gradient": (
        metrics_rows(policy__grad_norm=lambda step: 0.4 if step < 12 else 9.0),
        "the gradient norm jumped to 9, 22 times",
    ),
    "format_only": (
        metrics_rows(25, reward__accuracy=0.0, reward__format=0.95),
        "has learned the format, but its answers stay wrong",
    ),
    "hacking": (metrics_rows(eval__accuracy=lambda step: 0.6 - 0.04 * step), "rewards rise"),
    "flat": (
        metrics_rows(40, reward__mean=lambda step: 0.3 + 0.02 * math.sin(step)),
        "the reward has not moved in",
    ),
    "slow_rewards": (metrics_rows(time__rewards_s=30.0), "rewards take 50% of the time"),
    "waiting": (
        metrics_rows(staleness__mean=0.4, idle__engine=0.05, idle__learner=0.6),
        "the learner is idle for 60% of the time: use more servers",
    ),
    "far": (metrics_rows(kl__ref=3.0), "KL of 3.0 per token"),
    "language": (metrics_rows(completion__language=0.6), "only 60% of the text"),
    "merge": (metrics_rows(lora__merged=0.03), "have only 3% of the adapter's change"),
    "pass_rate": (metrics_rows(group__rate_unknown=1.0), "100% of groups have no pass rate"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_one_fault_has_one_finding_of_the_matching_rule(rule):
    rows, expected_text = FAULTY_RUNS[rule]
    (finding,) = diagnose(rows)
    assert finding.rule == rule
    assert expected_text in finding.text
    # The step of the finding is the first at which the rule applies.
    rows_before = rows[: finding.step - 1]
    assert rule not in [earlier.rule for earlier in diagnose(rows_before)]


def replace_in_completions(loop, **fields):
    """Replaces fields of every completion of the loop's engine."""
    original = loop.engine._completion

    def changed_completion(seed):
        return replace(original(seed), **fields)

    loop.engine._completion = changed_completion


def set_rewards(loop, **score_functions):
    """Sets the rewards of the loop by name. Each function is called as `(completion, problem)`."""
    loop.rollouts.rewards = {
        name: (reward_function(score), 1.0) for name, score in score_functions.items()
    }


def reward_function(score):
    """Returns a reward function of groups that applies `score` to each completion."""

    def reward(groups, _):
        return [
            [score(completion, group.problem) for completion in group.completions]
            for group in groups
        ]

    return reward


def first_token_is_even(completion, problem):
    return float(completion.token_ids[0] % 2 == 0)


def always_wrong(completion, problem):
    return Verdict(value="wrong")


def always_correct(completion, problem):
    return Verdict(value="correct")


def leave_the_loop_unchanged(loop):
    """For faults that the config or the random engine causes."""


def make_all_wrong(loop):
    set_rewards(loop, accuracy=always_wrong)


def make_all_correct(loop):
    set_rewards(loop, accuracy=always_correct)


def make_most_undecided(loop):
    def score(completion, problem):
        is_decided = completion.token_ids[0] % 3 == 0
        return Verdict(value="correct" if is_decided else "undecided")

    set_rewards(loop, accuracy=score)


def make_rewards_constant(loop):
    set_rewards(loop, constant=lambda completion, problem: 0.5)


def make_all_truncated(loop):
    replace_in_completions(loop, finish_reason="length")


def enlarge_the_rewards_of_rollout_13(loop):
    def score(completion, problem):
        factor = 99 if loop.progress.rollout == 12 else 1
        return first_token_is_even(completion, problem) * factor

    set_rewards(loop, even=score)


def reward_only_the_format(loop):
    set_rewards(
        loop,
        format=lambda completion, problem: 1.0,
        accuracy=always_wrong,
        even=first_token_is_even,
    )


def raise_rewards_while_held_out_accuracy_falls(loop):
    loop.rollouts.held_out = [
        Problem(id=f"p{i}", question="", answer="", source="held out") for i in range(8)
    ]

    def accuracy(completion, problem):
        is_correct = problem.source == "held out" and loop.progress.rollout < 3
        return Verdict(value="correct" if is_correct else "wrong")

    def length(completion, problem):
        return float(len(completion.token_ids) > 8 - loop.progress.rollout)

    set_rewards(loop, accuracy=accuracy, length=length)


def make_rewards_slow(loop):
    def score(completion, problem):
        time.sleep(0.05)
        return first_token_is_even(completion, problem)

    set_rewards(loop, even=score)


def make_completions_chinese(loop):
    replace_in_completions(loop, text="我们先把两个数相加然后得到最后的答案")


@dataclass(frozen=True, kw_only=True)
class LoopFault:
    """A fault of a real training loop: a change of the loop, and of sections of its config."""

    change: Callable[[Any], None] = leave_the_loop_unchanged
    train: dict[str, Any] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    other_sections: dict[str, Any] = field(default_factory=dict)


LOOP_FAULTS = {
    "too_hard": LoopFault(change=make_all_wrong),
    "too_easy": LoopFault(change=make_all_correct),
    "undecided": LoopFault(
        change=make_most_undecided, other_sections={"reward_pool": {"max_failed": 1.0}}
    ),
    "no_signal": LoopFault(change=make_rewards_constant),
    "truncated": LoopFault(change=make_all_truncated),
    "mismatch": LoopFault(),  # the random engine's logprobs are not those of the policy
    "zero_loss": LoopFault(algorithm={"kl_coef": 0.0}),
    "clipped": LoopFault(
        train={"updates_per_rollout": 4},
        algorithm={"clip_low": 1e-4, "clip_high": 1e-4},
        other_sections={"learner": {"lr": 1e-2}},
    ),
    "far": LoopFault(algorithm={"kl_coef": 1e-6}, other_sections={"learner": {"lr": 0.1}}),
    "gradient": LoopFault(
        change=enlarge_the_rewards_of_rollout_13,
        train={"rollouts": 13},
        algorithm={"advantage": "none"},
        other_sections={"learner": {"lr": 1e-9}},
    ),
    "format_only": LoopFault(change=reward_only_the_format, train={"rollouts": 20}),
    "hacking": LoopFault(
        change=raise_rewards_while_held_out_accuracy_falls,
        train={"rollouts": 8},
        other_sections={"eval": {"every": 1}},
    ),
    "flat": LoopFault(train={"rollouts": 40}, other_sections={"learner": {"lr": 1e-9}}),
    "slow_rewards": LoopFault(change=make_rewards_slow),
    "language": LoopFault(change=make_completions_chinese),
}


def english_problems(position, count):
    """Returns `count` problems from a position in an endless cycle of 40 problems."""
    return [
        Problem(id=f"p{i % 40}", question="How many apples are there?", answer="", source="t")
        for i in range(position, position + count)
    ]


@pytest.mark.parametrize("rule", LOOP_FAULTS)
def test_a_real_training_loop_with_a_fault_logs_the_diagnosis(tiny, tmp_path, rule):
    fault = LOOP_FAULTS[rule]
    loop = make_loop(
        tmp_path,
        tiny,
        take=english_problems,
        train={"rollouts": 5, "problems": 4, "group_size": 4, **fault.train},
        algorithm={"max_idle": 0, **fault.algorithm},
        **fault.other_sections,
    )
    messages = []
    loop.display.say = messages.append
    fault.change(loop)
    loop.train()
    assert any(message.startswith(f"diagnosis, {rule}: ") for message in messages), messages


def test_a_healthy_run_has_no_findings():
    assert diagnose(metrics_rows(60)) == []
    assert diagnose([]) == []
    # The entropy falls while the reward rises to its maximum and stays there.
    successful_run = metrics_rows(
        60,
        policy__entropy=lambda step: 1 / step,
        reward__mean=lambda step: min(1.1, step / 8),
        reward__accuracy=1.0,
    )
    assert diagnose(successful_run) == []


def test_metrics_that_are_missing_or_not_finite_have_no_findings():
    nan = float("nan")
    assert diagnose([{"step": i, "reward/mean": None} for i in range(20)]) == []
    nan_rows = [{"step": i, "reward/mean": nan, "group/all_wrong": nan} for i in range(20)]
    assert diagnose(nan_rows) == []


def test_a_run_whose_gradients_are_zero_has_no_jump_of_the_gradient():
    rows = metrics_rows(policy__grad_norm=lambda step: float(step == 12))
    assert diagnose(rows) == []


def test_a_resumed_run_does_not_repeat_earlier_findings():
    rows, _ = FAULTY_RUNS["undecided"]
    diagnosis = Diagnosis(rows[:8])
    for row in rows[8:]:
        assert diagnosis.add_row(row) == []


@pytest.mark.parametrize("action", ["snapshot", "stop"])
def test_an_alarm_keeps_a_checkpoint_and_the_action_stop_ends_the_run(tiny, tmp_path, action):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda completion, problem: 0.0,
        logging={"alarms": {"no_signal": action}},
        train={"rollouts": 8, "problems": 4, "group_size": 4},
        algorithm={"max_idle": 0},
    )
    if action == "stop":
        with pytest.raises(
            TrainingStoppedError,
            match=r"logging.alarms.no_signal: 100% of groups have equal rewards",
        ):
            loop.train()
        assert loop.progress.rollout == 5
    else:
        loop.train()
        assert loop.progress.rollout == 8
    checkpoint = tmp_path / "kept" / "alarm-no_signal"
    assert (checkpoint / "state.json").exists()
    assert loop.run.read_checkpoint_state(checkpoint)["step"] == 5


def test_an_alarm_of_an_unknown_rule_is_an_error():
    tree = {
        "run_dir": "x",
        "model": {"path": "tiny-qwen2"},
        "data": {"name": "arithmetic"},
        "train": {"rollouts": 1},
        "logging": {"alarms": {"entropi": "stop"}},
    }
    with pytest.raises(UserError, match=r"logging.alarms.*unknown rule. Available: too_hard"):
        configs.parse(tree)


def test_the_config_lists_the_names_of_all_rules():
    assert list(DIAGNOSIS_RULES) == list(RULES)
