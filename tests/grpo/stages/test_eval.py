"""Evaluation.

Protocols, several sets, chunks that are not sampled again, a model behind an endpoint, one problem
asked.
"""

import json

import pytest
from stage_configs import eval_config

from grpo import config as configs
from grpo.config import EvalConfig
from grpo.stages.eval import compare, markdown_table
from grpo.stages.final_model import final_model_path
from grpo.types import UserError


def test_protocols_set_what_they_name_and_nothing_of_a_training_is_asked_for(tiny, tmp_path):
    config = configs.load(
        eval_config(tmp_path, tiny()), ["eval.protocol=r1"], EvalConfig
    ).by_protocol()
    assert (config.sampling.max_tokens, config.sampling.top_p, config.eval.temperature) == (
        32768,
        0.95,
        0.6,
    )
    greedy = configs.load(
        eval_config(tmp_path, tiny()), ["eval.protocol=greedy"], EvalConfig
    ).by_protocol()
    assert (greedy.eval.temperature, greedy.eval.samples, greedy.sampling.max_tokens) == (
        0.0,
        1,
        12,
    )
    # more than a learner could take
    own = configs.load(eval_config(tmp_path, tiny()), ["sampling.max_tokens=30000"], EvalConfig)
    assert own.by_protocol() == own


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.warm_start=x.yaml", "evaluates model.path without training it"),
        ("endpoint={url: u, model: m}", "receives prompts as chat messages"),
        ("sets={1a: {name: arithmetic}}", "sets.1a: invalid name. A name starts with a letter"),
        ("eval.protocol=r2", "eval.protocol"),
    ],
)
def test_what_cannot_work_is_told(tiny, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        configs.load(eval_config(tmp_path, tiny()), [override], EvalConfig)


def test_a_run_directory_stands_for_the_model_that_it_left(tmp_path):
    (tmp_path / "manifest.json").write_text('{"final": "sft/final"}')
    assert (
        final_model_path(str(tmp_path)) == f"{tmp_path}/sft/final"
        and final_model_path("owner/name") == "owner/name"
    )


def test_the_table_has_a_row_a_set():
    found = {
        "accuracy": 0.5,
        "accuracy/low": 0.25,
        "accuracy/high": 0.75,
        "completion/length": 30.25,
    }
    table = markdown_table({"a": found | {"pass@2": 0.6}, "b": found})
    assert table.splitlines()[2:] == [
        "| a | 50.0% | 25.0% | 75.0% | 30.2 | 60.0% |",
        "| b | 50.0% | 25.0% | 75.0% | 30.2 |  |",
    ]


def test_two_evaluations_are_compared_set_by_set(tmp_path, capsys):
    def evaluated(run, **sets):
        (tmp_path / run / "samples").mkdir(parents=True)
        for name, verdicts in sets.items():
            lines = [
                json.dumps({"problem": f"p{i}", "verdict": verdict}) + "\n"
                for i, verdict in enumerate(verdicts)
            ]
            (tmp_path / run / "samples" / f"eval-{name}.jsonl").write_text("".join(lines))
        return str(tmp_path / run)

    right, wrong = ["correct"] * 4, ["wrong"] * 4
    a = evaluated("a", easy=right, hard=wrong)
    compare(a, evaluated("b", easy=[*right[:3], "wrong"], hard=["correct", *wrong[:3]]))
    out = capsys.readouterr().out
    assert "worse: p3 -100%" in out and "better: p0 +100%" in out and out.count("4 problems") == 2
    compare(
        evaluated("c", **{"000000": right}), evaluated("d", one=wrong)
    )  # a run's own set has no name
    assert "second - first: -100.0%" in capsys.readouterr().out
    with pytest.raises(UserError, match="no verdicts"):
        compare(a, evaluated("e", easy=[None]))
