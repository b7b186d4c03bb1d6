"""What is said of a run's numbers.

Every rule on a run with its fault, and nothing on one that is well.
"""

import math
import time
from dataclasses import replace

import pytest
from random_loop import make_loop

from grpo import config as configs
from grpo.config.sections import DIAGNOSIS_RULES
from grpo.metrics.diagnosis import RULES, Watch, findings
from grpo.types import Exhausted, Problem, UserError, Verdict

WELL = {
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


def run(count=12, **changed):
    """Rows of a run that is well but for what is changed: a value, or a function of the step."""
    made = []
    for step in range(1, count + 1):
        values = {
            key.replace("__", "/"): value(step) if callable(value) else value
            for key, value in changed.items()
        }
        made.append({"step": step} | WELL | {"reward/mean": 0.3 + 0.4 * step / count} | values)
    return made


FAULTS = {
    "too_hard": (
        run(group__all_wrong=0.82, reward__undecided=0.08),
        "82% of groups are all wrong (8% undecided)",
    ),
    "too_easy": (run(group__all_correct=0.9), "90% of groups are all correct"),
    "no_signal": (run(group__no_signal=0.95), "95% of groups have equal rewards"),
    "undecided": (run(reward__undecided=0.2), "20% of completions are undecided"),
    "truncated": (run(completion__truncated=0.5), "50% of completions are truncated"),
    "stale_weights": (
        run(probe__gap_share=lambda step: 0.3 if step < 8 else 0.8),
        "may be stale: the probe gap is 80% of the limit",
    ),
    "mismatch": (run(mismatch__abs=0.4), "engine and learner disagree"),
    "zero_loss": (run(loss=1e-9, update__made=1.0), "a loss near 0 is expected"),
    "entropy": (run(policy__entropy=lambda step: 1.0 / step**2), "entropy is collapsing"),
    "clipped": (run(clip__low=0.2, clip__high=0.15), "35% of tokens are clipped"),
    "gradient": (
        run(policy__grad_norm=lambda step: 0.4 if step < 12 else 9.0),
        "the gradient norm jumped to 9, 22 times",
    ),
    "format_only": (
        run(25, reward__accuracy=0.0, reward__format=0.95),
        "has learned the format, but its answers stay wrong",
    ),
    "hacking": (run(eval__accuracy=lambda step: 0.6 - 0.04 * step), "rewards rise"),
    "flat": (
        run(40, reward__mean=lambda step: 0.3 + 0.02 * math.sin(step)),
        "the reward has not moved in",
    ),
    "slow_rewards": (run(time__rewards_s=30.0), "rewards take 50% of the time"),
    "waiting": (
        run(staleness__mean=0.4, idle__engine=0.05, idle__learner=0.6),
        "the learner is idle for 60% of the time: use more servers",
    ),
    "far": (run(kl__ref=3.0), "KL of 3.0 per token"),
    "language": (run(completion__language=0.6), "only 60% of the text"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_speaks_once_of_its_own_fault_and_of_nothing_else(rule):
    rows, text = FAULTS[rule]
    (finding,) = findings(rows)
    assert finding.rule == rule and text in finding.text
    assert not [finding for finding in findings(rows[: finding.step - 1]) if finding.rule == rule]


def completing(loop, **changed):
    """Every completion of the loop's engine is as it would be, but for what is changed."""
    made = loop.engine._completion
    loop.engine._completion = lambda seed: replace(made(seed), **changed)


def rewarded(loop, **functions):
    """Rewards by name, of the loop, a completion and its problem."""
    loop.rollouts.rewards = {
        name: (
            lambda groups, _, f=f: [
                [f(loop, c, group.problem) for c in group.completions] for group in groups
            ],
            1.0,
        )
        for name, f in functions.items()
    }


def even(loop, completion, problem):
    return float(completion.token_ids[0] % 2 == 0)


def judge(value):
    return lambda loop, completion, problem: Verdict(value=value)


def seldom_decided(loop, completion, problem):
    return Verdict(value="undecided" if completion.token_ids[0] % 3 else "correct")


def hacked(loop):
    loop.rollouts.held_out = [
        Problem(id=f"p{i}", question="", answer="", source="held out") for i in range(8)
    ]
    rewarded(
        loop,
        accuracy=lambda loop, c, p: Verdict(
            value="correct" if p.source == "held out" and loop.progress.rollout < 3 else "wrong"
        ),
        length=lambda loop, c, p: float(len(c.token_ids) > 8 - loop.progress.rollout),
    )


EVERY = {"rollouts": 5, "problems": 4, "group_size": 4}
REAL = {  # what is done to a loop, and its config; each makes real rollouts and updates
    "too_hard": (lambda loop: rewarded(loop, accuracy=judge("wrong")), {}),
    "too_easy": (lambda loop: rewarded(loop, accuracy=judge("correct")), {}),
    "undecided": (lambda loop: rewarded(loop, accuracy=seldom_decided), {}),
    "no_signal": (lambda loop: rewarded(loop, kind=lambda *_: 0.5), {}),
    "truncated": (lambda loop: completing(loop, finish_reason="length"), {}),
    "mismatch": (lambda loop: None, {}),  # the engine's logprobs are of no model
    "zero_loss": (lambda loop: None, {"algorithm": {"kl_coef": 0.0}}),
    "clipped": (
        lambda loop: None,
        {
            "algorithm": {"clip_low": 1e-4, "clip_high": 1e-4},
            "learner": {"lr": 1e-2},
            "train": EVERY | {"updates_per_rollout": 4},
        },
    ),
    "far": (lambda loop: None, {"learner": {"lr": 0.1}, "algorithm": {"kl_coef": 1e-6}}),
    "gradient": (
        lambda loop: rewarded(
            loop,
            even=lambda loop, c, p: even(loop, c, p) * (99 if loop.progress.rollout == 12 else 1),
        ),
        {
            "algorithm": {"advantage": "none"},
            "train": EVERY | {"rollouts": 13},
            "learner": {"lr": 1e-9},
        },
    ),
    "format_only": (
        lambda loop: rewarded(
            loop, format=lambda loop, c, p: 1.0, accuracy=judge("wrong"), even=even
        ),
        {"train": EVERY | {"rollouts": 20}},
    ),
    "hacking": (hacked, {"train": EVERY | {"rollouts": 8}, "eval": {"every": 1}}),
    "flat": (lambda loop: None, {"train": EVERY | {"rollouts": 40}, "learner": {"lr": 1e-9}}),
    "slow_rewards": (lambda loop: rewarded(loop, even=lambda *a: time.sleep(0.05) or even(*a)), {}),
    "language": (lambda loop: completing(loop, text="我们先把两个数相加然后得到最后的答案"), {}),
}


@pytest.mark.parametrize("rule", REAL)
def test_a_real_loop_with_the_fault_is_told_of_it(tiny, tmp_path, rule):
    prepare, sections = REAL[rule]

    def named(at, n):
        return [
            Problem(
                id=f"p{(at + i) % 40}", question="How many apples are there?", answer="", source="t"
            )
            for i in range(n)
        ]

    loop = make_loop(
        tmp_path,
        tiny,
        take=named,
        **(
            {"train": EVERY}
            | sections
            | {"algorithm": {"max_idle": 0} | sections.get("algorithm", {})}
        ),
    )
    said = []
    loop.display.say = said.append
    prepare(loop)
    loop.train()
    assert any(text.startswith(f"diagnosis, {rule}: ") for text in said), said


def test_a_run_that_is_well_is_left_in_peace():
    assert findings(run(60)) == [] and findings([]) == []
    learned = run(
        60,
        policy__entropy=lambda step: 1 / step,
        reward__mean=lambda step: min(1.1, step / 8),
        reward__accuracy=1.0,
    )
    assert findings(learned) == []  # entropy falls as answers become sure


def test_missing_and_broken_numbers_say_nothing():
    assert findings([{"step": i, "reward/mean": None} for i in range(20)]) == []
    assert (
        findings(
            [
                {"step": i, "reward/mean": float("nan"), "group/all_wrong": float("nan")}
                for i in range(20)
            ]
        )
        == []
    )


def test_a_resumed_run_does_not_repeat_itself():
    rows, _ = FAULTS["undecided"]
    watch = Watch(rows[:8])
    assert [finding.rule for row in rows[8:] for finding in watch.see(row)] == []


@pytest.mark.parametrize("action", ["snapshot", "stop"])
def test_an_alarm_keeps_a_checkpoint_or_stops_with_one(tiny, tmp_path, action):
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
            Exhausted, match=r"logging.alarms.no_signal: 100% of groups have equal rewards"
        ):
            loop.train()
        assert loop.progress.rollout == 5
    else:
        loop.train()
        assert loop.progress.rollout == 8
    kept = tmp_path / "kept" / "alarm-no_signal"
    assert (kept / "state.json").exists() and loop.run.read_state(kept)["step"] == 5


def test_an_alarm_of_no_rule_is_refused():
    with pytest.raises(UserError, match=r"logging.alarms.*unknown rule. Available: too_hard"):
        configs.parse(
            {
                "run_dir": "x",
                "model": {"path": "tiny-qwen2"},
                "data": {"name": "arithmetic"},
                "train": {"rollouts": 1},
                "logging": {"alarms": {"entropi": "stop"}},
            }
        )


def test_the_config_knows_every_rule_by_name():
    assert list(DIAGNOSIS_RULES) == list(RULES)
