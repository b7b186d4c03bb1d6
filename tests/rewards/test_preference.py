"""The preference reward against a local server: requests, grades and errors."""

import pytest

from grpo.types import Completion, Group, Problem, RunError, UserError
from rewards.preference import prepare, reward


def group(*texts, answer=""):
    problem = Problem(id="p", question="Say hello.", answer=answer, source="s")
    completions = [
        Completion(
            token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
        )
        for text in texts
    ]
    return Group(problem=problem, prompt_ids=(1,), completions=tuple(completions))


def test_a_judge_grades_only_the_visible_answers_to_general_prompts(judge_server):
    url, requests, _ = judge_server
    groups = [group("<think>bad</think>good", "dull"), group("good", answer="4")]
    assert reward(groups, [None] * 2, url=url, model="rm") == [[0.8, None], [None]]
    tasks = [body["messages"][-1]["content"] for _, body in requests]
    assert len(tasks) == 2
    for task in tasks:
        assert "Say hello." in task
        assert "bad" not in task
    assert reward(groups, [None] * 2, url=url, model="rm", everywhere=True, thoughts=True) == [
        [0.8, None],
        [0.8],
    ]


@pytest.mark.parametrize(("kind", "value"), [("classify", 0.25), ("pooling", -2.5)])
def test_the_number_of_a_reward_model_is_the_reward(judge_server, kind, value):
    url, requests, _ = judge_server
    assert reward([group("good")], [None], url=url, model="rm", kind=kind) == [[value]]
    ((path, body),) = requests
    assert path == f"/v1/{kind}"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]


def test_a_failed_request_raises_a_run_error_with_the_url(judge_server):
    url, _, handler = judge_server
    handler.fail = True
    with pytest.raises(RunError, match=rf"rewards.preference: {url}: BadRequestError"):
        reward([group("good", "good")], [None], url=url, model="rm", retries=0)


def test_invalid_options_raise_a_user_error_before_the_run(judge_server):
    url, _, _ = judge_server
    prepare(url=url, model="rm")
    for options, message in (
        ({"model": "other"}, r"options.model=other: not served at .*\. Available: rm"),
        ({"model": "rm", "kind": "guess"}, "got 'guess', expected judge, classify or pooling"),
        ({"model": "rm", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        (
            {"model": "rm", "url": "http://127.0.0.1:9/v1"},
            "options.url=http://127.0.0.1:9/v1: APIConnectionError",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**({"url": url} | options))
