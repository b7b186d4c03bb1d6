"""The preference reward against a server of our own.

What it asks, what it reads, and what it says when the server fails.
"""

import pytest

from grpo.types import Completion, Group, Problem, RunError, UserError
from rewards.preference import prepare, reward


def group(*texts, answer=""):
    problem = Problem(id="p", question="Say hello.", answer=answer, source="s")
    made = [
        Completion(
            token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
        )
        for text in texts
    ]
    return Group(problem=problem, prompt_ids=(1,), completions=tuple(made))


def test_a_judge_grades_what_a_user_sees_of_general_prompts_alone(judge_server):
    url, asked, _ = judge_server
    groups = [group("<think>bad</think>good", "dull"), group("good", answer="4")]
    assert reward(groups, [None] * 2, url=url, model="rm") == [[0.8, None], [None]]
    seen = sorted(body["messages"][-1]["content"] for _, body in asked)
    assert (
        len(seen) == 2
        and all("Say hello." in text for text in seen)
        and not any("bad" in text for text in seen)
    )
    assert reward(groups, [None] * 2, url=url, model="rm", everywhere=True, thoughts=True) == [
        [0.8, None],
        [0.8],
    ]


@pytest.mark.parametrize(("kind", "value"), [("classify", 0.25), ("pooling", -2.5)])
def test_a_reward_models_number_is_taken_as_it_is(judge_server, kind, value):
    url, asked, _ = judge_server
    assert reward([group("good")], [None], url=url, model="rm", kind=kind) == [[value]]
    ((path, body),) = asked
    assert path == f"/v1/{kind}" and [message["role"] for message in body["messages"]] == [
        "user",
        "assistant",
    ]


def test_a_server_that_refuses_ends_the_run_with_its_address(judge_server):
    url, _, handler = judge_server
    handler.fail = True
    with pytest.raises(RunError, match=rf"rewards.preference: {url}: BadRequestError"):
        reward([group("good", "good")], [None], url=url, model="rm", retries=0)


def test_what_cannot_work_is_told_before_the_run(judge_server, monkeypatch):
    url, _, _ = judge_server
    prepare(url=url, model="rm")
    for options, message in (
        ({"model": "other"}, "options.model=other: not served at .*; have rm"),
        ({"model": "rm", "kind": "guess"}, "got 'guess'; give judge, classify or pooling"),
        ({"model": "rm", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        (
            {"model": "rm", "url": "http://127.0.0.1:9/v1"},
            "options.url=http://127.0.0.1:9/v1: APIConnectionError",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**{"url": url} | options)
