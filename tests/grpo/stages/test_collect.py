"""`grpo collect`: drop reasons, decontamination, teachers behind an endpoint, formats of traces."""

import json

import pytest
from stage_configs import collect_config
from whole_runs import run_grpo

from grpo.config import CollectSettings, EndpointSettings
from grpo.data import traces
from grpo.engines import EngineError, SamplingOptions
from grpo.engines.endpoint import Endpoint
from grpo.stages.collect import drop_reasons, ngrams
from grpo.types import Completion, Group, Problem, ScoredGroup, UserError, Verdict

GOOD = "<think>We add two and three, and that is five.</think><answer>5</answer>"


def scored_group(*texts, verdicts=None, finish_reasons=None):
    """Returns a scored group whose completions have as many tokens as words.

    By default all completions are correct and finished. A correct completion has the reward 1.
    """
    if verdicts is None:
        verdicts = ["correct"] * len(texts)
    if finish_reasons is None:
        finish_reasons = ["stop"] * len(texts)
    completions = []
    for text, finish_reason in zip(texts, finish_reasons, strict=True):
        completion = Completion(
            token_ids=(1,) * len(text.split()),
            logprobs=(),
            text=text,
            finish_reason=finish_reason,
            versions=((0, 0, 1),),
        )
        completions.append(completion)
    rewards = []
    for verdict in verdicts:
        rewards.append(None if verdict == "undecided" else float(verdict == "correct"))
    problem = Problem(id="p", question="What is two and three?", answer="5", source="t")
    return ScoredGroup(
        group=Group(problem=problem, prompt_ids=(), completions=tuple(completions)),
        rewards=tuple(rewards),
        parts=({},) * len(texts),
        verdicts=tuple(Verdict(value=verdict) for verdict in verdicts),
        faults=({},) * len(texts),
    )


def completion_with_thoughts(thoughts):
    return f"<think>{thoughts}</think><answer>5</answer>"


MIXED_LANGUAGES = "Das ist nicht der Weg und wir sind 两个数字相加等于五"
REPEATED_WORDS = "We add the two numbers. " * 20
LONG_THOUGHTS = " ".join(f"The word {i} is of it." for i in range(100))


@pytest.mark.parametrize("check_verdicts", [True, False])
def test_every_drop_reason(check_verdicts):
    # drop reason -> (text, verdict, finish reason)
    cases = {
        "": (GOOD, "correct", "stop"),
        "wrong": (GOOD, "wrong", "stop"),
        "undecided": (GOOD, "undecided", "stop"),
        "cut off": (GOOD, "correct", "length"),
        "not well-formed": (GOOD + " And more.", "correct", "stop"),
        "too short": (completion_with_thoughts("x"), "correct", "stop"),
        "language": (completion_with_thoughts(MIXED_LANGUAGES), "correct", "stop"),
        "repetition": (completion_with_thoughts(REPEATED_WORDS), "correct", "stop"),
        "too long": (completion_with_thoughts(LONG_THOUGHTS), "correct", "stop"),
    }
    settings = CollectSettings(
        problems=1,
        right=check_verdicts,
        min_tokens=3,
        max_tokens=200,
        language=0.8,
        repetition=0.5,
    )
    for reason, (text, verdict, finish_reason) in cases.items():
        expected = reason
        if not check_verdicts and verdict != "correct":
            expected = ""
        group = scored_group(text, verdicts=[verdict], finish_reasons=[finish_reason])
        assert drop_reasons([group], settings) == [expected]


def test_only_the_shortest_completions_without_duplicates_are_kept():
    longest = GOOD.replace("We add", "So now then we add")
    longer = GOOD.replace("We add", "Now we add")
    duplicate = GOOD.replace("We add", "We  add")
    group = scored_group(longest, longer, GOOD, duplicate)
    reasons = drop_reasons([group], CollectSettings(problems=1, keep=2))
    assert reasons == ["over keep", "", "", "duplicate"]


def test_ngrams_ignore_case_and_punctuation():
    question_ngrams = ngrams("If x + 3 = 5, what is the value of x?", 5)
    assert question_ngrams & ngrams("Now: WHAT is  the value, of y", 5)
    assert not question_ngrams & ngrams("what is the sum of x", 5)
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
def test_every_published_trace_format_is_read(tmp_path, row):
    (tmp_path / "traces.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = traces.load("train", seed=0, path=str(tmp_path))
    assert problem.question == "2+3?"
    assert "".join(problem.solution.split()) == "<think>a</think>5"


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
def test_invalid_trace_raises(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        traces.load("train", seed=0, path=str(tmp_path / "t.jsonl"))


@pytest.mark.engine
def test_problems_of_an_evaluation_set_are_not_collected(tiny, tmp_path):
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "What is one and two and three?", "answer": "6"}) + "\n"
    )
    train_rows = [
        {"question": "Say: what is one and two and three?", "answer": "6"},
        {"question": "Name a number.", "answer": "1"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train_rows))
    data = {
        "name": "jsonl",
        "path": str(tmp_path / "train.jsonl"),
        "options": {"test_fraction": 0.0},
    }
    evaluation_set = {
        "jsonl": {
            "path": str(tmp_path / "test.jsonl"),
            "options": {"test_path": str(tmp_path / "test.jsonl")},
        }
    }
    settings = {
        "problems": 2,
        "samples": 2,
        "format": False,
        "decontaminate": evaluation_set,
        "ngram": 5,
    }
    run_grpo(collect_config(tmp_path, tiny(), data=data, collect=settings), command="collect")
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["contaminated problems"] == 1
    # The other counts add up to the two completions of the other problem.
    assert sum(counts.values()) == 1 + 2


@pytest.mark.engine
def test_traces_are_collected_from_a_teacher_behind_an_endpoint(vllm_server, tiny, tmp_path):
    endpoint = Endpoint(EndpointSettings(url=vllm_server, model="teacher", concurrency=4))
    messages = [{"role": "user", "content": "2+3="}]
    # A request is (messages, seed, number of completions).
    requests = [(messages, 7, 2), (messages, 8, 1)]
    two_completions, one_completion = endpoint.generate(requests, SamplingOptions(max_tokens=5))
    assert len(two_completions) == 2
    assert len(one_completion) == 1
    assert len(two_completions[0].token_ids) <= 5
    # The seed of a request's second completion is the request's seed + 1: 7 + 1 = 8.
    assert two_completions[1].text == one_completion[0].text

    config = collect_config(
        tmp_path,
        tiny(),
        teacher={"url": vllm_server, "model": "teacher"},
        prompt={"template": "chat", "stop": list("etao")},
    )
    run_grpo(config, command="collect")
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["kept"] > 0


@pytest.mark.engine
def test_unusable_endpoint_raises(vllm_server):
    with pytest.raises(UserError, match=r"does not serve the model 'other'\. Available: teacher"):
        Endpoint(EndpointSettings(url=vllm_server, model="other"))
    with pytest.raises(UserError, match=r"endpoint http://127\.0\.0\.1:1/v1"):
        Endpoint(EndpointSettings(url="http://127.0.0.1:1/v1", model="teacher", retries=0))
    with pytest.raises(UserError, match=r"GRPO_NO_SUCH_KEY is not set \(api_key_env\)"):
        Endpoint(EndpointSettings(url=vllm_server, model="teacher", api_key_env="GRPO_NO_SUCH_KEY"))

    endpoint = Endpoint(EndpointSettings(url=vllm_server, model="teacher", retries=0))
    request = ([{"role": "user", "content": "x"}], 0, 1)
    with pytest.raises(EngineError, match="endpoint http"):
        endpoint.generate([request], SamplingOptions(max_tokens=100_000))
