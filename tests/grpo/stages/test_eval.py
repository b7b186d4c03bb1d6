"""`grpo eval`: protocols, config errors, the table of accuracies, and comparisons of two runs."""

import json
from pathlib import Path

import pytest
import yaml
from code_problems import isolation
from http_servers import judge_response
from stage_configs import eval_config, sft_config
from whole_runs import read_metrics, run_grpo, write_config

import grpo
from grpo import cli
from grpo import config as configs
from grpo.config import EvalConfig
from grpo.config.model import RopeSettings
from grpo.learning import models
from grpo.stages.eval import STAGE, compare, with_final_model
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
        ("sets={average: {name: math}}", "sets.average: this is the name of the table's last row"),
        ("sets={a: {name: math, rewards: {}}}", "sets.a.rewards is empty"),
        ("sets={a: {problems: 3}}", r"sets.a: set either name .* or mixture"),
        ("sets={a: {name: math, prompt: {sytem: r1}}}", r"sets.a.prompt.sytem: .*did you mean sys"),
        ("sets={a: {name: math, problem: 3}}", r"sets.a.problem: unknown key .*mean problems\?"),
        (
            "sets={a: {name: math, prompt: {chat_template: x.jinja}}}",
            "sets.a.prompt.chat_template: all sets have the same chat template",
        ),
        ("data={path: x}", "no problems: set data.name, or sets"),
        ("data={path: x, options: {a: 1}}", "options has no effect without name"),
        ("price=0", "price: input should be greater than 0"),
        ("data={name: traces, path: x}", "data.traces has no test split"),
        ("eval.protocol=r2", "eval.protocol"),
    ],
)
def test_invalid_eval_config_raises(tiny, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_eval_config(tmp_path, tiny(), override)


SETS = {
    "maths": {"name": "math"},
    "science": {
        "name": "gpqa",
        "rewards": {"choice": 1.0, "length": 0.5},
        "prompt": {"max_tokens": 100},
        "sampling": {"max_tokens": 50},
        "problems": 3,
        "samples": 4,
    },
}


def load_suite(tmp_path, *overrides, **changes):
    """Returns a config with the sets above. The config itself has 48 + 12 tokens."""
    sections = {
        "prompt": {"template": "plain", "max_tokens": 48},
        "sampling": {"max_tokens": 12, "top_k": 5},
        "data": {"path": "folder"},
        "sets": SETS,
        **changes,
    }
    return configs.load(eval_config(tmp_path, "m", **sections), list(overrides), EvalConfig)


def test_a_set_changes_keys_of_the_prompt_and_the_sampling_and_replaces_the_rewards(tmp_path):
    config = load_suite(tmp_path, "prompt.stop=[x]", "sets.science.sampling.top_p=0.5")
    maths, science = config.set_configs().values()
    assert (maths.prompt, maths.sampling, maths.rewards) == (
        config.prompt,
        config.sampling,
        config.rewards,
    )
    assert (maths.eval.problems, maths.eval.samples) == (6, 2)
    # Keys that the set does not have are those of the config, also from the command line.
    assert science.prompt == config.prompt.model_copy(update={"max_tokens": 100})
    assert science.prompt.stop == ["x"]
    assert (science.sampling.max_tokens, science.sampling.top_k) == (50, 5)
    assert science.sampling.top_p == 0.5
    assert (science.eval.problems, science.eval.samples) == (3, 4)
    assert list(science.rewards) == ["choice", "length"]
    assert science.rewards["length"].options == {"max_tokens": 50, "buffer": 10}
    assert science.evaluation_sets["science"].path == "folder"
    assert config.rewards_of_samples("eval-science") == science.rewards
    assert config.rewards_of_samples("part-science-000012") == science.rewards
    assert config.rewards_of_samples("eval-maths") == config.rewards
    # The engine of all sets has the context of the longest one.
    assert config.max_sequence_tokens == 150
    keys = "sets.science.prompt.max_tokens + sets.science.sampling.max_tokens"
    assert config.length_keys == keys


def test_a_dumped_evaluation_is_the_same_config_again(tmp_path):
    config = load_suite(tmp_path)
    assert configs.parse(yaml.safe_load(configs.dump(config)), kind=EvalConfig) == config


def test_an_empty_value_removes_a_set(tmp_path):
    assert list(load_suite(tmp_path, "sets.maths=").sets) == ["science"]
    with pytest.raises(UserError, match="no problems: set data"):
        load_suite(tmp_path, "sets.maths=", "sets.science=")


def test_a_protocol_applies_to_every_set(tmp_path):
    r1 = load_suite(tmp_path, "eval.protocol=r1").with_protocol()
    for config in r1.set_configs().values():
        assert (config.sampling.max_tokens, config.sampling.top_p) == (32768, 0.95)
        assert (config.eval.temperature, config.eval.samples) == (0.6, 2)
    assert r1.max_sequence_tokens == 32768 + 100
    greedy = load_suite(tmp_path, "eval.protocol=greedy").with_protocol()
    for config in greedy.set_configs().values():
        assert (config.eval.temperature, config.eval.samples) == (0.0, 1)
    assert greedy.set_configs()["science"].sampling.max_tokens == 50


def test_several_completions_of_one_set_need_a_temperature(tmp_path):
    message = r"sets.science.samples=4 with eval.temperature=0: greedy completions are all the same"
    with pytest.raises(UserError, match=message):
        load_suite(tmp_path, eval={"samples": 1, "temperature": 0.0})


def test_a_train_config_keeps_the_path_of_its_own_problems(tmp_path):
    """Sets without a path come from the hub, as without this feature."""
    data = {"name": "gsm8k", "path": "gsm8k.jsonl"}
    config = load_suite(tmp_path, data=data, sets={"maths": {"name": "math"}})
    assert config.evaluation_sets["maths"].path is None


def test_the_doctor_inspects_sets_with_the_same_prompts_and_rewards_together(tmp_path):
    sets = {**SETS, "more": {"name": "amc", "problems": 2}}
    config = load_suite(tmp_path, sets=sets)
    parts = STAGE.parts(config)
    assert [part.name for part in parts] == ["maths and 1 more", "science"]
    assert list(parts[0].config.sets) == ["maths", "more"]
    problems = [each.eval.problems for each in parts[0].config.set_configs().values()]
    assert problems == [6, 2]
    assert list(parts[1].config.rewards) == ["choice", "length"]


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

    partly = write_evaluation(tmp_path / "f", easy=correct, hard=[None])
    compare(first, partly)
    output = capsys.readouterr().out
    assert f"{partly} hard: not compared, its rewards return no verdicts" in output
    assert output.count("4 problems") == 1

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


# One text for all problems: a final answer, and a program that solves one of the two tasks.
RESPONSE = "\\boxed{4}\n```python\ndef double(x):\n    return 2 * x\n```"


def write_suite(tmp_path, url):
    """Writes the files of three sets and the config of their evaluation, and returns its path."""
    folder = tmp_path / "data"
    folder.mkdir()

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("amc23.jsonl", [{"problem": f"2+{i}?", "answer": 2 + i} for i in (2, 3, 4, 5)])
    wrong = {f"Incorrect Answer {i}": f"{i}00" for i in (1, 2, 3)}
    write(
        "gpqa_diamond.jsonl",
        [{"Question": f"2+{i}?", "Correct Answer": str(2 + i), **wrong} for i in (2, 3)],
    )
    tasks = [(11, "double", 2), (12, "triple", 3)]
    write(
        "mbpp.jsonl",
        [
            {"task_id": i, "text": name, "code": "?", "test_list": [f"assert {name}(5) == {5 * k}"]}
            for i, name, k in tasks
        ],
    )
    sandbox = {"weight": 1.0, "options": {"isolation": isolation()}}
    return eval_config(
        tmp_path,
        "unused",
        endpoint={"url": url, "model": "rm"},
        prompt={"template": "chat", "system": "Think."},
        data={"path": str(folder)},
        rewards={"accuracy": 1.0},
        eval={"problems": 50},
        price=3600.0,
        chunk=3,
        sets={
            "amc": {"name": "amc"},
            "gpqa": {"name": "gpqa", "rewards": {"choice": 1.0}},
            "mbpp": {
                "name": "mbpp",
                "rewards": {"code": sandbox},
                "prompt": {"system": "Program."},
                "sampling": {"max_tokens": 77},
            },
        },
    )


def test_errors_name_the_set(tmp_path):
    tree = yaml.safe_load(Path(write_suite(tmp_path, "http://localhost:1")).read_text())
    tree["sets"]["gpqa"]["sampling"] = {"temperature": 0.5}
    with pytest.raises(UserError, match=r"sets\.gpqa\.sampling\.temperature has no effect"):
        configs.parse(tree, kind=EvalConfig)
    tree["sets"]["gpqa"]["sampling"] = {}
    tree["sets"]["gpqa"]["rewards"] = {"nope": 1.0}
    with pytest.raises(UserError, match=r"sets\.gpqa: .*nope"):
        STAGE.dry_run_lines(configs.parse(tree, kind=EvalConfig))


def test_one_evaluation_has_maths_choices_and_programs_and_a_table_with_their_average(
    tmp_path, judge_server, capsys
):
    url, requests, server = judge_server
    server.response = {**judge_response(RESPONSE), "usage": {"completion_tokens": 10}}
    config = write_suite(tmp_path, url)
    assert cli.main(["eval", config, "logging.progress=line"]) == 0
    run_dir = tmp_path / "run"
    table = json.loads((run_dir / "table.json").read_text())
    assert list(table) == ["amc", "gpqa", "mbpp", "average"]
    accuracies = {name: metrics["accuracy"] for name, metrics in table.items()}
    assert accuracies == {"amc": 0.25, "gpqa": 0.5, "mbpp": 0.5, "average": 1.25 / 3}
    assert table["average"]["problems"] == 8
    for metrics in table.values():
        seconds = metrics["time/sampling_s"] + metrics["time/scoring_s"]
        assert metrics["cost"] == pytest.approx(seconds)  # one per second
        assert metrics["time/sampling_s"] > 0
    assert table["average"]["time/sampling_s"] == pytest.approx(
        sum(table[name]["time/sampling_s"] for name in ("amc", "gpqa", "mbpp"))
    )
    # The real sandbox has judged the correct and the wrong program.
    samples = (run_dir / "samples" / "eval-mbpp.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in samples]
    assert {row["meta"]["test_list"][0][7:13]: row["verdict"] for row in rows} == {
        "double": "correct",
        "triple": "wrong",
    }
    # Each set has its own prompt and limit.
    sent = {(body["messages"][0]["content"], body["max_tokens"]) for _, body in requests}
    assert sent == {("Think.", 12), ("Program.", 77)}
    assert len(requests) == 8
    written = (run_dir / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert written.splitlines()[-1].startswith("| average |        8 |  41.7% [8.3, 75.0] |")
    (row,) = read_metrics(run_dir)
    assert row["eval/average/accuracy"] == accuracies["average"]
    assert row["eval/mbpp/accuracy"] == 0.5

    # The finished evaluation gets another price. Nothing is sampled again.
    assert cli.main(["eval", config, "price=36", "--resume"]) == 0
    cheaper = json.loads((run_dir / "table.json").read_text())
    assert cheaper["average"]["cost"] == pytest.approx(table["average"]["cost"] / 100)
    assert len(requests) == 8

    # The samples can be scored again, each set with its rewards, and compared with themselves.
    assert cli.main(["grade", str(run_dir)]) == 0
    output = capsys.readouterr().out
    for reward, mean in [("accuracy", 0.25), ("choice", 0.5), ("code", 0.5)]:
        assert f"{reward:12} {mean:.4f} then, {mean:.4f} now, 0 changed" in output
    assert cli.main(["eval", str(run_dir), str(run_dir)]) == 0
    assert capsys.readouterr().out.count("second - first: +0.0%") == 3

    # In Python, nothing is printed unless it is asked for.
    run = grpo.evaluate(config, {"run_dir": str(tmp_path / "quiet")})
    assert capsys.readouterr() == ("", "")
    assert run.table["average"]["accuracy"] == accuracies["average"]


def test_an_interrupted_evaluation_reports_the_seconds_of_all_chunks(tmp_path, judge_server):
    url, requests, server = judge_server
    server.response = {**judge_response(RESPONSE), "usage": {"completion_tokens": 10}}
    config = write_suite(tmp_path, url)
    run_grpo(config, command="eval")
    run_dir = tmp_path / "run"
    times_file = run_dir / "times.json"
    times = json.loads(times_file.read_text())
    assert {name: list(chunks) for name, chunks in times.items()} == {
        "amc": ["0", "1"],
        "gpqa": ["0"],
        "mbpp": ["0"],
    }
    # As if the process had been killed in the second chunk of the first set.
    samples = run_dir / "samples"
    lines = (samples / "eval-amc.jsonl").read_text().splitlines(keepends=True)
    (samples / "part-amc-000000.jsonl").write_text("".join(lines[:3]))
    for name in ("amc", "gpqa", "mbpp"):
        (samples / f"eval-{name}.jsonl").unlink()
    times_file.write_text(json.dumps({"amc": {"0": {"sampling": 1000.0, "scoring": 100.0}}}))
    requests.clear()
    run_grpo(config, "--resume", command="eval")
    assert len(requests) == 5
    table = json.loads((run_dir / "table.json").read_text())
    assert 1000 < table["amc"]["time/sampling_s"] < 1300
    assert 100 <= table["amc"]["time/scoring_s"] < 400
    assert table["average"]["time/sampling_s"] > table["amc"]["time/sampling_s"]


def test_the_dry_run_shows_a_prompt_of_each_kind_and_names_missing_files(tiny, tmp_path, capsys):
    for name in ("amc23", "math500"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"problem": "{name}?", "answer": "1"}}\n')
    sets = {
        "amc": {"name": "amc"},
        "math": {"name": "math"},
        "short": {"name": "math", "prompt": {"stop": ["x"]}, "rewards": {"choice": 1.0}},
    }
    config = eval_config(tmp_path, tiny(), data={"path": str(tmp_path)}, sets=sets)
    assert cli.main(["eval", config, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "short  at most 6 problems, 2 completions of at most 12 tokens" in output
    assert "scored by choice" in output
    kinds = output[output.index("amc and 1 more:") :]
    first, _, second = kinds.partition("short:")
    assert "amc23?" in first
    assert "stop strings x" in second
    assert "math500?" in second
    (tmp_path / "amc23.jsonl").unlink()
    assert cli.main(["eval", config, "--dry-run"]) == 2
    assert "To evaluate without these sets: sets.amc=" in capsys.readouterr().err


def test_prompts_of_all_sets_are_checked_before_the_engine_starts(tiny, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"problem": "long " * 100, "answer": "1"}) + "\n")
    sets = {"sums": {"name": "arithmetic"}, "long": {"name": "amc", "path": str(path)}}
    errors = run_grpo(
        eval_config(tmp_path, tiny(), sets=sets, logging={"progress": "line"}),
        command="eval",
        code=2,
    )
    assert "sets.long: 1 of 1 prompts are longer than prompt.max_tokens=48" in errors
    assert "starting the engine" not in errors
    assert not (tmp_path / "run" / "manifest.json").exists()
