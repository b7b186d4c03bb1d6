"""`grpo eval`: protocols, config errors, the table of accuracies, and comparisons of two runs."""

import json

import pytest
from http_servers import judge_response
from stage_configs import eval_config, sft_config
from whole_runs import run_grpo, write_config

from grpo import config as configs
from grpo.config import EvalConfig
from grpo.config.model import RopeSettings
from grpo.learning import models
from grpo.stages.eval import compare, markdown_table, with_final_model
from grpo.stages.final_model import final_model_path
from grpo.tools.report import completions
from grpo.types import UserError


def load_eval_config(tmp_path, model_dir, override):
    return configs.load(eval_config(tmp_path, model_dir), [override], EvalConfig)


def test_protocols_replace_sampling_settings(tiny, tmp_path):
    config = load_eval_config(tmp_path, tiny(), "eval.protocol=r1")
    r1 = config.with_protocol()
    assert r1.sampling.max_tokens == 32768
    assert r1.sampling.top_p == 0.95
    assert r1.eval.temperature == 0.6

    config = load_eval_config(tmp_path, tiny(), "eval.protocol=greedy")
    greedy = config.with_protocol()
    assert greedy.eval.temperature == 0.0
    assert greedy.eval.samples == 1
    assert greedy.sampling.max_tokens == 12  # from the config

    # Without a protocol the config does not change. No limit of a learner applies to max_tokens.
    config = load_eval_config(tmp_path, tiny(), "sampling.max_tokens=30000")
    assert config.with_protocol() == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.warm_start=x.yaml", "evaluates model.path without training it"),
        ("endpoint={url: u, model: m}", "receives prompts as chat messages"),
        ("sets={1a: {name: arithmetic}}", "sets.1a: invalid name. A name starts with a letter"),
        ("data={name: traces, path: x}", "data.traces has no test split"),
        ("eval.protocol=r2", "eval.protocol"),
    ],
)
def test_invalid_eval_config_raises(tiny, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_eval_config(tmp_path, tiny(), override)


def test_a_context_that_the_training_has_extended_is_not_extended_again(tiny, tmp_path):
    rope = {"type": "yarn", "factor": 4.0, "original_tokens": None}
    extended = models.extend_context(tiny(), RopeSettings(**rope), tmp_path / "extended")

    def evaluated_rope(path, **changes):
        override = f"model={{path: {path}, rope: {json.dumps({**rope, **changes})}}}"
        return with_final_model(load_eval_config(tmp_path, path, override)).model.rope

    assert evaluated_rope(extended) is None
    assert evaluated_rope(tiny()) == RopeSettings(**rope)
    assert evaluated_rope(extended, factor=8.0) == RopeSettings(**{**rope, "factor": 8.0})


def test_a_config_of_sft_can_be_evaluated(tiny, tmp_path):
    training = sft_config(tmp_path / "sft", tiny(), data={"name": "traces", "path": "x"})
    sets = ["sets={sums: {name: arithmetic}}", "sampling.max_tokens=64"]
    config = configs.load(write_config(tmp_path / "sft.yaml", training), sets, EvalConfig)
    assert list(config.evaluation_sets) == ["sums"]
    assert config.prompt == training.prompt


def test_path_of_a_finished_run_resolves_to_its_final_model(tmp_path):
    (tmp_path / "manifest.json").write_text('{"final": "sft/final"}')
    assert final_model_path(str(tmp_path)) == f"{tmp_path}/sft/final"
    assert final_model_path("owner/name") == "owner/name"


def test_markdown_table_has_one_row_per_set():
    metrics = {
        "accuracy": 0.5,
        "accuracy/low": 0.25,
        "accuracy/high": 0.75,
        "completion/length": 30.25,
    }
    table = markdown_table({"a": metrics | {"pass@2": 0.6}, "b": metrics})
    assert table.splitlines()[2:] == [
        "| a | 50.0% | 25.0% | 75.0% | 30.2 | 60.0% |",
        "| b | 50.0% | 25.0% | 75.0% | 30.2 |  |",
    ]


def write_evaluation(run_dir, **verdicts_by_set):
    """Writes the samples of an evaluation, one per problem, and returns its run directory."""
    samples = run_dir / "samples"
    samples.mkdir(parents=True)
    for name, verdicts in verdicts_by_set.items():
        lines = []
        for i, verdict in enumerate(verdicts):
            lines.append(json.dumps({"problem": f"p{i}", "verdict": verdict}) + "\n")
        (samples / f"eval-{name}.jsonl").write_text("".join(lines))
    return str(run_dir)


def test_compare_prints_the_differences_of_each_set(tmp_path, capsys):
    correct = ["correct"] * 4
    wrong = ["wrong"] * 4
    first = write_evaluation(tmp_path / "a", easy=correct, hard=wrong)
    second = write_evaluation(
        tmp_path / "b", easy=[*correct[:3], "wrong"], hard=["correct", *wrong[:3]]
    )
    compare(first, second)
    output = capsys.readouterr().out
    assert "worse: p3 -100%" in output
    assert "better: p0 +100%" in output
    assert output.count("4 problems") == 2

    # The evaluation of a training run has no set name. Problems are matched by their ids only.
    unnamed = write_evaluation(tmp_path / "c", **{"000000": correct})
    named = write_evaluation(tmp_path / "d", one=wrong)
    compare(unnamed, named)
    assert "second - first: -100.0%" in capsys.readouterr().out

    without_verdict = write_evaluation(tmp_path / "e", easy=[None])
    with pytest.raises(UserError, match="no verdicts"):
        compare(first, without_verdict)


def test_completions_with_line_separators_and_surrogates_are_evaluated_and_read_again(
    tiny, tmp_path, judge_server
):
    url, _, server = judge_server
    server.response = judge_response("a\u2028b\u2029c\x85d\ud800e")
    config = eval_config(
        tmp_path,
        tiny(),
        endpoint={"url": url, "model": "rm"},
        prompt={"template": "chat"},
        eval={"problems": 2, "samples": 2, "temperature": 1.0},
    )
    run_grpo(config, command="eval")
    samples_file = tmp_path / "run" / "samples" / "eval-000000.jsonl"
    (tmp_path / "run" / "table.json").unlink()  # as if killed after the last chunk
    run_grpo(config, "--resume", command="eval")

    # Two problems with two samples and a greedy completion each. U+FFFD replaces the surrogate.
    texts = [json.loads(line)["completion"] for line in samples_file.read_text().splitlines()]
    assert texts == ["a\u2028b\u2029c\x85d\ufffde"] * 6
    assert [row[2] for row in completions({"run": tmp_path / "run"})["rows"]] == texts
    assert json.loads((tmp_path / "run" / "table.json").read_text())
