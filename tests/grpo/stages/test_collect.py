"""Rejection sampling.

What is kept, what is dropped and why; a run that goes on where it was killed; traces in every
published form.
"""

import json

import pytest
from stage_configs import collect_config
from whole_runs import run

from data import traces
from grpo.config import Collect, Teacher
from grpo.engines import EngineError, SamplingOptions
from grpo.engines.endpoint import Endpoint
from grpo.stages.collect import drop_reasons, ngrams
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
        assert drop_reasons([scored(text, values=[value], reasons=[reason])], settings) == [
            expected
        ]
        # a student's own texts, for soft targets
        own = settings.model_copy(update={"right": False})
        assert drop_reasons([scored(text, values=[value], reasons=[reason])], own) == [
            "" if value != "correct" else expected
        ]


def test_the_shortest_are_kept_without_duplicates():
    longer, same = GOOD.replace("We add", "Now we add"), GOOD.replace("We add", "We  add")
    longest = GOOD.replace("We add", "So now then we add")
    assert drop_reasons([scored(longest, longer, GOOD, same)], Collect(problems=1, keep=2)) == [
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
    run(collect_config(tmp_path, tiny(), data=mine, collect=settings), command="collect")
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["contaminated problems"] == 1 and sum(counts.values()) == 1 + 2


@pytest.mark.engine
def test_a_teacher_behind_an_endpoint(vllm_server, tiny, tmp_path):
    endpoint = Endpoint(Teacher(url=vllm_server, model="teacher", concurrency=4))
    messages = [{"role": "user", "content": "2+3="}]
    (first, second) = endpoint.generate(
        [(messages, 7, 2), (messages, 8, 1)], SamplingOptions(max_tokens=5)
    )
    assert len(first) == 2 and len(second) == 1 and len(first[0].token_ids) <= 5
    assert first[1].text == second[0].text  # seed 7 + 1
    config = collect_config(
        tmp_path,
        tiny(),
        teacher={"url": vllm_server, "model": "teacher"},
        prompt={"template": "chat", "stop": list("etao")},
    )
    run(config, command="collect")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]["kept"] > 0


@pytest.mark.engine
def test_a_teacher_that_is_not_there_or_refuses_is_told(vllm_server, monkeypatch):
    with pytest.raises(UserError, match=r"does not serve this model\. Available: teacher"):
        Endpoint(Teacher(url=vllm_server, model="other"))
    with pytest.raises(UserError, match=r"teacher\.url=http://127\.0\.0\.1:1/v1"):
        Endpoint(Teacher(url="http://127.0.0.1:1/v1", model="teacher", retries=0))
    with pytest.raises(UserError, match="GRPO_NO_SUCH_KEY is not set"):
        Endpoint(Teacher(url=vllm_server, model="teacher", api_key_env="GRPO_NO_SUCH_KEY"))
    endpoint = Endpoint(Teacher(url=vllm_server, model="teacher", retries=0))
    with pytest.raises(EngineError, match="teacher http"):
        endpoint.generate(
            [([{"role": "user", "content": "x"}], 0, 1)], SamplingOptions(max_tokens=100_000)
        )
