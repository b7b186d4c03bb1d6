"""The preference reward with a local server: requests, grades and errors."""

import pytest

from grpo.types import Completion, Group, Problem, RunError, UserError
from rewards.preference import prepare, reward


def group(*texts, answer=""):
    problem = Problem(id="p", question="Say hello.", answer=answer, source="s")
    completions = []
    for text in texts:
        completion = Completion(
            token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
        )
        completions.append(completion)
    return Group(problem=problem, prompt_ids=(1,), completions=tuple(completions))


def test_a_judge_grades_only_the_visible_answers_to_problems_without_a_gold_answer(judge_server):
    """The server gives the grade 8 of 10 to texts that contain "good", and no grade to others."""
    url, requests, _ = judge_server
    without_gold_answer = group("<think>bad</think>good", "dull")
    with_gold_answer = group("good", answer="4")
    groups = [without_gold_answer, with_gold_answer]
    prompts = [None, None]
    assert reward(groups, prompts, url=url, model="rm") == [[0.8, None], [None]]
    contents = [body["messages"][-1]["content"] for _, body in requests]
    assert len(contents) == 2
    for content in contents:
        assert "Say hello." in content
        assert "bad" not in content
    rewards = reward(groups, prompts, url=url, model="rm", everywhere=True, thoughts=True)
    assert rewards == [[0.8, None], [0.8]]


@pytest.mark.parametrize(("kind", "expected"), [("classify", 0.25), ("pooling", -2.5)])
def test_the_score_of_a_reward_model_is_the_reward(judge_server, kind, expected):
    url, requests, _ = judge_server
    assert reward([group("good")], [None], url=url, model="rm", kind=kind) == [[expected]]
    ((path, body),) = requests
    assert path == f"/v1/{kind}"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]


def test_a_failed_request_raises_a_run_error_with_the_url(judge_server):
    url, _, handler = judge_server
    handler.rejects_requests = True
    with pytest.raises(RunError, match=rf"rewards.preference: {url}: BadRequestError"):
        reward([group("good", "good")], [None], url=url, model="rm", retries=0)


def test_invalid_options_raise_a_user_error_before_the_run(judge_server):
    url, _, _ = judge_server
    prepare(url=url, model="rm")
    with pytest.raises(UserError, match=r"options.model=other: not served at .*\. Available: rm"):
        prepare(url=url, model="other")
    with pytest.raises(UserError, match="got 'guess', expected judge, classify or pooling"):
        prepare(url=url, model="rm", kind="guess")
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        prepare(url=url, model="rm", api_key_env="NO_SUCH_KEY")
    unreachable_url = "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match=f"options.url={unreachable_url}: APIConnectionError"):
        prepare(url=unreachable_url, model="rm")
