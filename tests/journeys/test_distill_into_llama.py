"""docs/sft.md, R1's traces into Llama-3.1-8B: its commands, on a tiny Llama and local traces.

Only the model, the traces, the evaluation set and their sizes differ from the shipped config. A
gated model is tested in tests/grpo/learning/test_hub.py.
"""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from whole_runs import read_metrics, run_grpo

from grpo import config as configs
from grpo import json_lines
from grpo.config import EvalConfig, SftConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sft.md").read_text()
UPDATES = 3
BATCH_SIZE = 16
MAX_TOKENS = 400


@pytest.fixture(autouse=True)
def _project_directory(monkeypatch):
    """Runs the commands where the page's user does."""
    monkeypatch.chdir(ROOT)


def page_commands():
    """Returns the commands of the section, by their name, as lists of arguments."""
    section = PAGE.partition("## R1's traces into Llama-3.1-8B\n")[2]
    block = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE).group(1)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[:2] for words in commands] == [
        ["grpo", "doctor"],
        ["grpo", "sft"],
        ["grpo", "eval"],
    ]
    return {words[1]: words[2:] for words in commands}


def test_the_page_evaluates_the_run_of_its_training():
    commands = page_commands()
    training = configs.load(commands["sft"][0], commands["sft"][1:], SftConfig)
    evaluation = configs.load(commands["eval"][0], commands["eval"][1:], EvalConfig)
    assert evaluation.model.path == training.run_dir != evaluation.run_dir
    assert evaluation.with_protocol().sampling.max_tokens == 32768
    assert evaluation.sets["math500"].name == "math"


def trace(number, text):
    """Returns a row in the form of OpenR1-Math-220k."""
    question = f"What is {number} + 1?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"problem": question, "answer": str(number + 1), "messages": messages}


def write_traces(path, *, num_malformed):
    """Writes 40 usable traces of different lengths, malformed ones, and one that is too long."""
    rows = []
    for i in range(40):
        thoughts = "One more. " * (i % 6)
        rows.append(trace(i, f"<think>\n{thoughts}\n</think>\n\\boxed{{{i + 1}}}"))
    rows.extend(trace(100 + i, "no thoughts") for i in range(num_malformed))
    rows.append(trace(200, f"<think>\n{'long ' * 100}\n</think>\n201"))
    path.write_text(json_lines.to_lines(rows))
    return str(path)


def overrides(tmp_path, model_dir, traces):
    """Returns the overrides that shrink the config, for the doctor and for the training."""
    return [
        f"run_dir={tmp_path / 'run'}",
        f"model.path={model_dir}",
        f"data.path={traces}",
        f"prompt.max_tokens={MAX_TOKENS}",
        f"sft={{updates: {UPDATES}, batch_size: {BATCH_SIZE}, max_tokens: {MAX_TOKENS}}}",
        "learner.micro_batch_tokens=800",
    ]


def test_the_commands_of_the_page_train_and_evaluate_a_llama_without_a_chat_template(
    tiny, tmp_path, capfd
):
    commands = page_commands()
    traces = write_traces(tmp_path / "traces.jsonl", num_malformed=1)
    changes = overrides(tmp_path, tiny("tiny-llama"), traces)
    run_grpo(*commands["doctor"], *changes, command="doctor")
    assert "nothing failed" in capfd.readouterr().out

    output = run_grpo(*commands["sft"], *changes, command="sft")
    assert "data.traces: dropped 1 of 42 problems" in output
    assert "sft: dropped 1 of 41 problems" in output
    run_dir = tmp_path / "run"
    rows = read_metrics(run_dir)
    assert len(rows) == UPDATES
    # Sized by the maximum length, two solutions would fit, and there would be 8.
    assert {row["update/micro_batches"] for row in rows} == {4}

    final = AutoTokenizer.from_pretrained(run_dir / "final")
    text = final.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 1?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 1?<|eot_id|>")
    assert text.endswith("<think>\n")

    run_grpo(
        *commands["eval"],
        f"model.path={run_dir}",
        f"run_dir={tmp_path / 'eval'}",
        "eval.protocol=greedy",
        "eval.problems=4",
        "sets={sums: {name: arithmetic, options: {digits: 1}}}",
        f"prompt.max_tokens={MAX_TOKENS}",
        "sampling.max_tokens=16",
        "engine.kv_cache_gb=0.05",
        command="eval",
    )
    samples = tmp_path / "eval" / "samples" / "eval-sums.jsonl"
    assert len(json_lines.read_objects(samples)) == 4
    assert "accuracy" in (tmp_path / "eval" / "table.md").read_text()


def test_too_many_malformed_traces_stop_the_run_before_the_model_is_trained(tiny, tmp_path):
    traces = write_traces(tmp_path / "traces.jsonl", num_malformed=11)
    changes = overrides(tmp_path, tiny("tiny-llama"), traces)
    errors = run_grpo(*page_commands()["sft"], *changes, command="sft", code=2)
    assert "dropped 11 of 52 problems" in errors
    assert "data.max_dropped" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "final").exists()
