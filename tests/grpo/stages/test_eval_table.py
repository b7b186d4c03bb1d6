"""The table of an evaluation: its columns, and the average over the sets."""

import pytest

from grpo.stages.eval_table import (
    SetResult,
    average,
    evaluation_metrics,
    markdown_table,
    pass_rates,
)

METRICS = {
    "problems": 1319.0,
    "accuracy": 0.5,
    "accuracy/low": 0.25,
    "accuracy/high": 0.75,
    "completion/length": 30.25,
}


def rows(verdicts_by_problem, reward="accuracy", text="<answer>4</answer>"):
    """Returns rows of samples/: `{"p0": ["correct", "wrong"]}` has two completions of a problem."""
    result = []
    for problem, verdicts in verdicts_by_problem.items():
        for verdict in verdicts:
            result.append(
                {
                    "problem": problem,
                    "completion": text,
                    "reward": 0.0,
                    "parts": {reward: 0.0},
                    "verdict": verdict,
                    "tokens": 10,
                    "finish_reason": "stop",
                }
            )
    return result


def test_markdown_table_has_one_row_per_set_and_columns_in_a_fixed_order():
    table = markdown_table({"a": {"mean": 0.1, "pass@16": 0.9, **METRICS, "pass@2": 0.6}, "bc": {}})
    assert table.splitlines() == [
        "| set | problems |    accuracy [95 %] | pass@2 | pass@16 | length |",
        "| --- | -------- | ------------------ | ------ | ------- | ------ |",
        "| a   |    1,319 | 50.0% [25.0, 75.0] |  60.0% |   90.0% |   30.2 |",
        "| bc  |          |                    |        |         |        |",
    ]


def test_the_average_weighs_every_set_equally_and_sums_what_is_spent():
    easy = {
        "problems": 4.0,
        "accuracy": 1.0,
        "completion/length": 100.0,
        "completion/truncated": 0.0,
        "completion/tokens": 400.0,
        "time/sampling_s": 2.0,
        "time/scoring_s": 1.0,
        "cost": 0.25,
    }
    hard = {
        "problems": 2.0,
        "accuracy": 0.5,
        "completion/length": 300.0,
        "completion/truncated": 0.5,
        "completion/tokens": 600.0,
        "time/sampling_s": 3.0,
        "time/scoring_s": 0.5,
        "cost": 0.5,
    }
    row = average(
        {
            "easy": SetResult(metrics=easy, pass_rates=[1.0] * 4),
            "hard": SetResult(metrics=hard, pass_rates=[0.0, 1.0]),
        }
    )
    # The interval is worked out by hand in tests/grpo/metrics/test_statistics.py.
    assert row == {
        "accuracy": 0.75,
        "accuracy/low": 0.5,
        "accuracy/high": 1.0,
        "completion/truncated": 0.25,
        "completion/length": 200.0,
        "problems": 6.0,
        "completion/tokens": 1000.0,
        "time/sampling_s": 5.0,
        "time/scoring_s": 1.5,
        "cost": 0.75,
        "tokens_per_s": 200.0,
    }


def test_the_average_leaves_out_what_a_set_does_not_have():
    scored = SetResult(
        metrics={"accuracy": 1.0, "problems": 3.0, "time/sampling_s": 1.0}, pass_rates=[1.0]
    )
    unscored = SetResult(metrics={"problems": 2.0}, pass_rates=None)
    assert average({"a": scored, "b": unscored}) == {"problems": 5.0}


def test_pass_rates_are_shares_of_correct_completions_per_problem():
    verdicts = {"p0": ["correct", "wrong", "wrong", "undecided"], "p1": ["correct"] * 2}
    assert pass_rates(rows(verdicts)) == [0.25, 1.0]
    assert pass_rates(rows({"p0": ["correct", None]})) is None


def test_programs_have_no_majority_vote():
    verdicts = {"p0": ["correct", "wrong", "wrong"]}
    assert evaluation_metrics(rows(verdicts))["maj@3"] == pytest.approx(0.0)
    metrics = evaluation_metrics(rows(verdicts, reward="code", text="```python\npass\n```"))
    assert metrics["pass@1"] == pytest.approx(1 / 3)
    assert "maj@3" not in metrics
