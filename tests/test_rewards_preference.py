"""The preference reward against a server of our own.

What it asks, what it reads, and what it says when the server fails.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import tiny_config
from whole_runs import rows, run, start, wait_for, write_config

from grpo.types import Completion, Group, Problem, RunError, UserError
from rewards.preference import prepare, reward


@pytest.fixture
def server():
    """Answers as a judge (grades by the answer's length), a classifier and a pooler.

    `fail` makes it refuse.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        fail = False

        def do_GET(self):
            self.answer(
                {
                    "object": "list",
                    "data": [{"id": "rm", "object": "model", "created": 0, "owned_by": "us"}],
                }
            )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            if Handler.fail:
                self.send_error(400, "no")
                return
            text = body["messages"][-1]["content"]
            if self.path == "/v1/classify":
                self.answer({"data": [{"index": 0, "label": "x", "probs": [0.9, 0.25]}]})
            elif self.path == "/v1/pooling":
                self.answer({"data": [{"index": 0, "object": "pooling", "data": [[1.0], [-2.5]]}]})
            else:
                words = (
                    "I like it. Grade: 3 at first\n**Grade: 8**"
                    if "good" in text
                    else "I cannot say."
                )
                message = {"role": "assistant", "content": words}
                self.answer(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "rm",
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    }
                )

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked, Handler
    http.shutdown()


def group(*texts, answer=""):
    problem = Problem(id="p", question="Say hello.", answer=answer, source="s")
    made = [
        Completion(
            token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
        )
        for text in texts
    ]
    return Group(problem=problem, prompt_ids=(1,), completions=tuple(made))


def test_a_judge_grades_what_a_user_sees_of_general_prompts_alone(server):
    url, asked, _ = server
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
def test_a_reward_models_number_is_taken_as_it_is(server, kind, value):
    url, asked, _ = server
    assert reward([group("good")], [None], url=url, model="rm", kind=kind) == [[value]]
    ((path, body),) = asked
    assert path == f"/v1/{kind}" and [message["role"] for message in body["messages"]] == [
        "user",
        "assistant",
    ]


def test_a_server_that_refuses_ends_the_run_with_its_address(server):
    url, _, handler = server
    handler.fail = True
    with pytest.raises(RunError, match=rf"rewards.preference: {url}: BadRequestError"):
        reward([group("good", "good")], [None], url=url, model="rm", retries=0)


def test_what_cannot_work_is_told_before_the_run(server, monkeypatch):
    url, _, _ = server
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


@pytest.mark.engine
def test_an_endpoint_that_goes_down_in_a_run_costs_what_was_being_done(server, tiny, tmp_path):
    url, _, handler = server
    judged = {
        "preference": {
            "weight": 1.0,
            "options": {
                "url": url,
                "model": "rm",
                "kind": "classify",
                "everywhere": True,
                "retries": 0,
            },
        }
    }
    sections = {
        "train": {"rollouts": 6, "problems": 2, "group_size": 2},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
    }
    config = write_config(
        tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny(), rewards=judged, **sections)
    )
    process = start(config)
    wait_for(lambda: (tmp_path / "run" / "samples" / "step-000002.jsonl").exists(), process)
    handler.fail = True
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and f"rewards.preference: {url}: BadRequestError" in errors
    handler.fail = False
    run(config, "--resume")
    assert [row["step"] for row in rows(tmp_path / "run") if "reward/preference" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
