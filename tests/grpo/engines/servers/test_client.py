"""Answers of a server over real HTTP: completions, or a typed error."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grpo import config as configs
from grpo.engines import (
    AbortedRequestError,
    EngineDeadError,
    EngineError,
    IncompleteResponseError,
    MalformedResponseError,
    NoResponseError,
    RefusedError,
    Request,
    SamplingOptions,
    ServerError,
    UnknownWeightVersionError,
)
from grpo.engines.servers.availability import WatchedServers
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.scheduler import Scheduler
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import WeightUpdates
from grpo.run.addresses import free_port
from grpo.types import UserError

REQUEST = Request(prompt_ids=(5, 6), seed=7, n=2)
OPTIONS = SamplingOptions(max_tokens=3)


def choice(index, **changes):
    """Returns a completion of the tokens 10, 11 as vLLM sends it."""
    return {
        "index": index,
        "token_ids": [10, 11],
        "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]},
        "finish_reason": "length",
        "stop_reason": None,
        "weight_versions": [{"version": "4", "start": 0, "end": 2}],
    } | changes


GOOD = json.dumps({"choices": [choice(1), choice(0)]})


@pytest.fixture
def answers():
    """Yields `(url, answers, bodies)`: a server that gives each request the next answer.

    An answer is `(status, text)`; the last one is given again and again.
    """
    queue, bodies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length", 0))
            bodies.append(self.rfile.read(length))
            status, text = queue.pop(0) if len(queue) > 1 else queue[0]
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", queue, bodies
    http.shutdown()
    http.server_close()


def make_client():
    return ServerClient(
        token="secret",
        token_env="GRPO_ENGINE_TOKEN",
        timeout_s=10.0,
        decode=lambda ids: " ".join(map(str, ids)),
        cache_salt="salt",
    )


def ask(url, version=4):
    """Returns what a server at `url` answers REQUEST."""

    async def generate():
        client = make_client()
        try:
            return await client.generate(Server(url=url), REQUEST, OPTIONS, version)
        finally:
            await client.close()

    return asyncio.run(generate())


def test_completions_come_in_order_with_the_versions_of_their_tokens(answers):
    url, queue, bodies = answers
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    stopped = choice(0, finish_reason="stop", weight_versions=spans)
    queue.append((200, json.dumps({"choices": [choice(1), stopped], "id": "x"})))
    first, second = ask(url)
    assert first.token_ids == second.token_ids == (10, 11) and first.logprobs == (-0.5, -1.0)
    assert (first.text, second.text) == ("10", "10 11")  # a stop token is not in the text
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert first.versions == ((3, 0, 1), (4, 1, 2)) and second.versions == ((4, 0, 2),)
    body = json.loads(bodies[0])
    assert body["token_ids"] == [5, 6] and body["cache_salt"] == "salt 4"
    assert body["sampling_params"]["seed"] == 7 and body["sampling_params"]["n"] == 2


UNDECODABLE = {
    "no JSON": "<html>",
    "half of it": GOOD[: len(GOOD) // 2],
    "no choices": "{}",
    "a list": "[]",
    "a completion without an index": json.dumps({"choices": [{"token_ids": [1]}] * 2}),
    "tokens of text": json.dumps({"choices": [choice(0, token_ids=["a"]), choice(1)]}),
    "a negative token": json.dumps({"choices": [choice(0, token_ids=[10, -1]), choice(1)]}),
    "no logprobs": json.dumps({"choices": [choice(0, logprobs=None), choice(1)]}),
    "a logprob too few": json.dumps({"choices": [choice(0, token_ids=[1, 2, 3]), choice(1)]}),
    "a gap between versions": json.dumps(
        {"choices": [choice(0, weight_versions=[{"version": "4", "start": 1, "end": 2}])] * 2}
    ),
}


@pytest.mark.parametrize("text", UNDECODABLE.values(), ids=UNDECODABLE.keys())
def test_an_answer_that_cannot_be_decoded_is_an_engine_error(answers, text):
    url, queue, _ = answers
    queue.append((200, text))
    with pytest.raises(MalformedResponseError, match="the response cannot be decoded"):
        ask(url)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([choice(0)], IncompleteResponseError, "incomplete response: 1 of 2 completions"),
        (
            [choice(0, finish_reason="abort", logprobs=None), choice(1)],
            AbortedRequestError,
            "aborted request: finish_reason=abort",
        ),
        (
            [choice(0, weight_versions=[{"version": "default", "start": 0, "end": 2}]), choice(1)],
            UnknownWeightVersionError,
            r"unknown weight version: .*\(current version 4\)",
        ),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_error_of_its_own_class(
    answers, choices, error, message
):
    url, queue, _ = answers
    queue.append((200, json.dumps({"choices": choices})))
    with pytest.raises(error, match=message):
        ask(url)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RefusedError), (404, RefusedError), (500, ServerError), (503, EngineDeadError)],
)
def test_an_error_status_is_a_field_of_the_error(answers, status, error):
    url, queue, _ = answers
    queue.append((status, "says: 500 and: 503"))  # the text decides nothing
    with pytest.raises(ServerError) as caught:
        ask(url)
    assert type(caught.value) is error and caught.value.status == status


def test_a_wrong_token_is_the_users_mistake_and_silence_is_not(answers):
    url, queue, _ = answers
    queue.append((401, ""))
    with pytest.raises(UserError, match=r"rejected the token \(401\): set GRPO_ENGINE_TOKEN"):
        ask(url)
    with pytest.raises(NoResponseError, match="ConnectError"):
        ask(f"http://127.0.0.1:{free_port()}")


def test_an_answer_that_cannot_be_decoded_is_asked_for_again(answers):
    url, queue, bodies = answers
    queue += [(200, "<html>"), (200, '{"choices": [1]}'), (200, GOOD)]

    async def drill():
        client = make_client()
        state = PoolState([Server(url=url, up=True, version=4) for _ in range(3)])
        state.version = 4
        settings = configs.Engine(servers=configs.Servers(count=3))
        supervisor = Supervisor(
            state,
            WeightUpdates(client, sync_timeout_s=10.0),
            settings,
            keeps_weights=True,
            say=lambda _: None,
        )
        watched = WatchedServers(state, supervisor)
        scheduler = Scheduler(state, client, watched, max_sequences=8, retries=2)
        try:
            return await scheduler.sample(REQUEST, OPTIONS), state.counts["retried"]
        finally:
            await client.close()

    completions, num_retried = asyncio.run(drill())
    assert len(completions) == 2 and num_retried == 2
    assert len(set(bodies)) == 1  # the same seed each time


@pytest.mark.parametrize("text", ["<html>", "{}", '{"weight_version": 3}'])
def test_a_weight_version_that_cannot_be_decoded_is_an_engine_error(answers, text):
    url, queue, _ = answers
    queue.append((200, text))

    async def look():
        client = make_client()
        try:
            await client.weight_version(Server(url=url))
        finally:
            await client.close()

    with pytest.raises(MalformedResponseError, match="/weight_info"):
        asyncio.run(look())


def test_the_count_of_generated_tokens_is_read_from_the_metrics(answers):
    url, queue, _ = answers
    line = 'vllm:generation_tokens_total{engine="0",model_name="m"}'
    queue += [(200, f"# HELP\n{line} 42.0\nother 1\n"), (200, "nothing"), (200, f"{line} many\n")]

    async def look():
        client = make_client()
        server = Server(url=url)
        try:
            counts = [await client.num_generated_tokens(server, 5.0) for _ in range(2)]
            with pytest.raises(EngineError, match="'many' is not a number of tokens"):
                await client.num_generated_tokens(server, 5.0)
            return counts
        finally:
            await client.close()

    assert asyncio.run(look()) == [42.0, 0.0]
