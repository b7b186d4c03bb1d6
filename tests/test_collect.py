"""Rejection sampling.

What is kept, what is dropped and why; a run that goes on where it was killed; traces in every
published form.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from test_eval import eval_config
from whole_runs import rows, run, start

from data import traces
from grpo.config_stages import Collect, Teacher
from grpo.engines import EngineError, SamplingOptions
from grpo.engines.endpoint import Endpoint
from grpo.stages.collect import dropped, ngrams
from grpo.types import Completion, Group, Problem, ScoredGroup, UserError, Verdict

GOOD = "<think>We add two and three, and that is five.</think><answer>5</answer>"


def scored(*texts, values=None, reasons=None, question="What is two and three?"):
    problem = Problem(id="p", question=question, answer="5", source="t")
    completions = tuple(
        Completion(
            token_ids=(1,) * len(text.split()),
            logprobs=(),
            text=text,
            finish_reason=reason,
            versions=((0, 0, 1),),
        )
        for text, reason in zip(texts, reasons or ["stop"] * len(texts), strict=True)
    )
    verdicts = tuple(Verdict(value=value) for value in values or ["correct"] * len(texts))
    known = tuple(
        None if verdict.value == "undecided" else float(verdict.value == "correct")
        for verdict in verdicts
    )
    group = Group(problem=problem, prompt_ids=(), completions=completions)
    return ScoredGroup(
        group=group,
        rewards=known,
        parts=({},) * len(texts),
        verdicts=verdicts,
        faults=({},) * len(texts),
    )


def test_every_reason_to_drop_a_completion():
    loop = "sum " * 60
    cases = {
        "": (GOOD, "correct", "stop"),
        "wrong": (GOOD, "wrong", "stop"),
        "undecided": (GOOD, "undecided", "stop"),
        "cut off": (GOOD, "correct", "length"),
        "not well-formed": (GOOD + " And more.", "correct", "stop"),
        "too short": ("<think>x</think><answer>5</answer>", "correct", "stop"),
        "language": (
            "<think>Das ist nicht der Weg und wir sind 两个数字相加等于五</think>"
            "<answer>5</answer>",
            "correct",
            "stop",
        ),
        "repetition": (f"<think>The {loop}</think><answer>5</answer>", "correct", "stop"),
        "too long": (
            "<think>"
            + " ".join(f"The word {i} is of it." for i in range(100))
            + "</think><answer>5</answer>",
            "correct",
            "stop",
        ),
    }
    settings = Collect(problems=1, min_tokens=3, max_tokens=200, language=0.8, repetition=0.5)
    for expected, (text, value, reason) in cases.items():
        assert dropped([scored(text, values=[value], reasons=[reason])], settings) == [expected]
        # a student's own texts, for soft targets
        own = settings.model_copy(update={"right": False})
        assert dropped([scored(text, values=[value], reasons=[reason])], own) == [
            "" if value != "correct" else expected
        ]


def test_the_shortest_are_kept_without_duplicates():
    longer, same = GOOD.replace("We add", "Now we add"), GOOD.replace("We add", "We  add")
    longest = GOOD.replace("We add", "So now then we add")
    assert dropped([scored(longest, longer, GOOD, same)], Collect(problems=1, keep=2)) == [
        "over keep",
        "",
        "",
        "duplicate",
    ]


def test_ngrams_see_an_overlap_whatever_its_case_and_marks():
    runs = ngrams("If x + 3 = 5, what is the value of x?", 5)
    assert runs & ngrams("Now: WHAT is  the value, of y", 5)
    assert not runs & ngrams("what is the sum of x", 5)
    assert ngrams("Two words", 5) == {("two", "words")}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+3?", "answer": "5", "solution": "<think>a</think>5"},
        {
            "problem": "2+3?",
            "messages": [
                {"role": "user", "content": "2+3?"},
                {"role": "assistant", "content": "<think>a</think>5"},
            ],
        },
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "2+3?"},
                {"from": "gpt", "value": "<think>a</think>5"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "2+3?"},
                {"role": "assistant", "content": "5", "reasoning_content": "a"},
            ]
        },
        {"prompt": "2+3?", "completion": "a</think>5"},
        {
            "prompt": [{"role": "user", "content": "2+3?"}],
            "completion": [{"role": "assistant", "content": "<think>a</think>5"}],
        },
        {"instruction": "2+3?", "reasoning": "a", "response": "5"},
        {
            "question": "2+3?",
            "solution": "<|begin_of_thought|>a<|end_of_thought|>"
            "<|begin_of_solution|>5<|end_of_solution|>",
        },
    ],
)
def test_traces_of_every_published_form_are_read(tmp_path, row):
    (tmp_path / "traces.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = traces.load("train", seed=0, path=str(tmp_path))
    assert (problem.question, "".join(problem.solution.split())) == ("2+3?", "<think>a</think>5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2+3?", "solution": "5"}, "line 1: no thoughts"),
        ({"question": "2+3?"}, "line 1: no solution or trace or completion"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "expected one message of user, got 2",
        ),
    ],
)
def test_a_row_that_is_no_trace_is_named(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        traces.load("train", seed=0, path=str(tmp_path / "t.jsonl"))


def config_of(tmp_path, model, **sections):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48, "stop": list("etao")},
        "sampling": {"max_tokens": 12},
        "rewards": {"finished": 1.0},
        "engine": {"kv_cache_gb": 0.05, "timeout_s": 60},
        "collect": {"problems": 6, "samples": 4, "keep": 2, "chunk": 2, "format": False},
        "logging": {"progress": "off"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | sections))
    return str(tmp_path / "config.yaml")


@pytest.mark.engine
def test_a_killed_collection_goes_on_and_ends_like_one_that_never_was(tiny, tmp_path):
    config = config_of(tmp_path, tiny())
    run(config, command="collect")
    whole = (tmp_path / "run" / "traces.jsonl").read_text()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = [json.loads(line) for line in whole.splitlines()]
    assert manifest["status"] == "finished" and manifest["counts"]["kept"] == len(kept) > 0
    assert sum(manifest["counts"].values()) == 6 * 4 and [
        row["step"] for row in rows(tmp_path / "run")
    ] == [1, 2, 3]
    for name in ("traces.jsonl", "samples/chunk-000003.jsonl"):
        (tmp_path / "run" / name).unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run(config, "--resume", command="collect")
    assert (tmp_path / "run" / "traces.jsonl").read_text() == whole


@pytest.mark.engine
def test_problems_of_an_evaluation_set_are_not_collected(tiny, tmp_path):
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "What is one and two and three?", "answer": "6"}) + "\n"
    )
    asked = [
        {"question": "Say: what is one and two and three?", "answer": "6"},
        {"question": "Name a number.", "answer": "1"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    mine = {
        "name": "jsonl",
        "path": str(tmp_path / "train.jsonl"),
        "options": {"test_fraction": 0.0},
    }
    against = {
        "jsonl": {
            "path": str(tmp_path / "test.jsonl"),
            "options": {"test_path": str(tmp_path / "test.jsonl")},
        }
    }
    settings = {"problems": 2, "samples": 2, "format": False, "decontaminate": against, "ngram": 5}
    run(config_of(tmp_path, tiny(), data=mine, collect=settings), command="collect")
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["contaminated problems"] == 1 and sum(counts.values()) == 1 + 2


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A real vLLM server on a tiny model."""
    folder = tmp_path_factory.mktemp("server")
    model = shutil.copytree(tiny(), folder / "model")
    (folder / "template").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "model": str(model),
        "served-model-name": "teacher",
        "port": str(port),
        "host": "127.0.0.1",
        "dtype": "float32",
        "block-size": "32",
        "chat-template": str(folder / "template"),
        "max-model-len": "256",
        "kv-cache-memory-bytes": str(50 * 2**20),
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enforce-eager",
        *flags,
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "log"
                ).read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.engine
def test_a_teacher_behind_an_endpoint(server, tiny, tmp_path):
    endpoint = Endpoint(Teacher(url=server, model="teacher", concurrency=4))
    messages = [{"role": "user", "content": "2+3="}]
    (first, second) = endpoint.generate(
        [(messages, 7, 2), (messages, 8, 1)], SamplingOptions(max_tokens=5)
    )
    assert len(first) == 2 and len(second) == 1 and len(first[0].token_ids) <= 5
    assert first[1].text == second[0].text  # seed 7 + 1
    config = config_of(
        tmp_path,
        tiny(),
        teacher={"url": server, "model": "teacher"},
        prompt={"template": "chat", "stop": list("etao")},
    )
    run(config, command="collect")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]["kept"] > 0


@pytest.mark.engine
def test_the_same_answers_come_from_a_directory_from_an_endpoint_and_to_one_who_asks(
    server, tiny, tmp_path
):
    made, shown = {}, ["eval={protocol: greedy, problems: 4}", "sampling.max_tokens=12"]
    for name, more in {
        "own": [],
        "endpoint": [f"endpoint={{url: {server}, model: teacher}}", "prompt.template=chat"],
    }.items():
        run(
            eval_config(tmp_path, tiny()),
            f"run_dir={tmp_path / name}",
            *shown,
            *more,
            command="eval",
        )
        made[name] = [
            json.loads(line)
            for line in (tmp_path / name / "samples" / "eval-000000.jsonl").read_text().splitlines()
        ]
        assert (
            rows(tmp_path / name)[0]["eval/accuracy"] == 0
            and (tmp_path / name / "table.md").exists()
        )
    # bytes that are no text
    texts = {
        name: [row["completion"].replace("\ufffd", "") for row in found]
        for name, found in made.items()
    }
    assert texts["own"] == texts["endpoint"] and len(texts["own"]) == 4 and any(texts["own"])
    shutil.copytree(tiny(), tmp_path / "own" / "final")
    process = start(
        str(tmp_path / "own"),
        "--ask",
        made["own"][0]["question"],
        command="eval",
        stdout=subprocess.PIPE,
    )
    assert process.communicate(timeout=120)[0].strip() == made["own"][0]["completion"].strip()


@pytest.mark.engine
def test_a_teacher_that_is_not_there_or_refuses_is_told(server, monkeypatch):
    with pytest.raises(UserError, match=r"not served at .*; have teacher"):
        Endpoint(Teacher(url=server, model="other"))
    with pytest.raises(UserError, match=r"teacher\.url=http://127\.0\.0\.1:1/v1"):
        Endpoint(Teacher(url="http://127.0.0.1:1/v1", model="teacher", retries=0))
    with pytest.raises(UserError, match="GRPO_NO_SUCH_KEY is not set"):
        Endpoint(Teacher(url=server, model="teacher", api_key_env="GRPO_NO_SUCH_KEY"))
    endpoint = Endpoint(Teacher(url=server, model="teacher", retries=0))
    with pytest.raises(EngineError, match="teacher http"):
        endpoint.generate(
            [([{"role": "user", "content": "x"}], 0, 1)], SamplingOptions(max_tokens=100_000)
        )
