"""The HTTP client of a server: it returns completions or raises a typed error."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
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
    RejectedRequestError,
    Request,
    SamplingOptions,
    ServerError,
    UnknownWeightVersionError,
)
from grpo.engines.servers.availability import SupervisedAvailability
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
VERSION = 4  # the current weight version


@dataclass
class ScriptedServer:
    """An HTTP server that sends prepared responses.

    Attributes:
        url: the URL of the server.
        responses: `(status, text)` of the next responses. The last one is sent repeatedly.
        request_bodies: the bodies of the requests that have arrived.
    """

    url: str
    responses: list[tuple[int, str]] = field(default_factory=list)
    request_bodies: list[bytes] = field(default_factory=list)

    def next_response(self):
        if len(self.responses) > 1:
            return self.responses.pop(0)
        return self.responses[0]


@pytest.fixture
def scripted_server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length", 0))
            server.request_bodies.append(self.rfile.read(length))
            status, text = server.next_response()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ScriptedServer(url=f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield server
    http.shutdown()
    http.server_close()


def choice(index, **changes):
    """Returns a completion of the tokens 10 and 11 in the format of vLLM's response."""
    fields = {
        "index": index,
        "token_ids": [10, 11],
        "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]},
        "finish_reason": "length",
        "stop_reason": None,
        "weight_versions": [{"version": "4", "start": 0, "end": 2}],
    }
    fields.update(changes)
    return fields


def response_text(*choices):
    return json.dumps({"choices": choices})


VALID_RESPONSE = response_text(choice(1), choice(0))


def decode(token_ids):
    return " ".join(str(token_id) for token_id in token_ids)


def run_with_client(work):
    """Runs `await work(client)` with a new client and returns the result."""

    async def run():
        client = ServerClient(
            token="secret",
            token_env="GRPO_ENGINE_TOKEN",
            timeout_s=10.0,
            decode=decode,
            cache_salt="salt",
        )
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def generate(url):
    """Returns the completions of REQUEST that the server at `url` sends."""

    async def send_request(client):
        return await client.generate(Server(url=url), REQUEST, OPTIONS, VERSION)

    return run_with_client(send_request)


def test_completions_are_ordered_and_have_the_weight_versions_of_their_tokens(scripted_server):
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    stopped = choice(0, finish_reason="stop", weight_versions=spans)
    text = json.dumps({"choices": [choice(1), stopped], "id": "x"})
    scripted_server.responses.append((200, text))

    first, second = generate(scripted_server.url)

    assert first.token_ids == (10, 11)
    assert second.token_ids == (10, 11)
    assert first.logprobs == (-0.5, -1.0)
    assert first.text == "10"  # the text does not contain the stop token
    assert second.text == "10 11"
    assert first.finish_reason == "stop"
    assert second.finish_reason == "length"
    assert first.versions == ((3, 0, 1), (4, 1, 2))
    assert second.versions == ((4, 0, 2),)
    body = json.loads(scripted_server.request_bodies[0])
    assert body["token_ids"] == [5, 6]
    assert body["cache_salt"] == "salt 4"
    assert body["sampling_params"]["seed"] == 7
    assert body["sampling_params"]["n"] == 2


LATE_SPAN = choice(0, weight_versions=[{"version": "4", "start": 1, "end": 2}])
NO_INDEX = {"token_ids": [1]}
MALFORMED_RESPONSES = {
    "no JSON": "<html>",
    "truncated": VALID_RESPONSE[: len(VALID_RESPONSE) // 2],
    "no choices": "{}",
    "a list": "[]",
    "completions without an index": response_text(NO_INDEX, NO_INDEX),
    "a text as token id": response_text(choice(0, token_ids=["a"]), choice(1)),
    "a negative token id": response_text(choice(0, token_ids=[10, -1]), choice(1)),
    "no logprobs": response_text(choice(0, logprobs=None), choice(1)),
    "fewer logprobs than tokens": response_text(choice(0, token_ids=[1, 2, 3]), choice(1)),
    "a token without a weight version": response_text(LATE_SPAN, LATE_SPAN),
}


@pytest.mark.parametrize("text", MALFORMED_RESPONSES.values(), ids=MALFORMED_RESPONSES.keys())
def test_malformed_response_is_an_engine_error(scripted_server, text):
    scripted_server.responses.append((200, text))
    with pytest.raises(MalformedResponseError, match="the response cannot be decoded"):
        generate(scripted_server.url)


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
def test_each_kind_of_unusable_response_has_its_error_class(
    scripted_server, choices, error, message
):
    scripted_server.responses.append((200, response_text(*choices)))
    with pytest.raises(error, match=message):
        generate(scripted_server.url)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RejectedRequestError),
        (404, RejectedRequestError),
        (500, ServerError),
        (503, EngineDeadError),
    ],
)
def test_status_of_a_response_determines_the_error_class(scripted_server, status, error):
    # The text names other statuses. It must not influence the class.
    scripted_server.responses.append((status, "says: 500 and: 503"))
    with pytest.raises(ServerError) as raised:
        generate(scripted_server.url)
    assert type(raised.value) is error
    assert raised.value.status == status


def test_rejected_token_is_a_user_error_and_a_missing_response_is_an_engine_error(scripted_server):
    scripted_server.responses.append((401, ""))
    with pytest.raises(UserError, match=r"rejected the token \(401\): set GRPO_ENGINE_TOKEN"):
        generate(scripted_server.url)
    with pytest.raises(NoResponseError, match="ConnectError"):
        generate(f"http://127.0.0.1:{free_port()}")


def make_scheduler(servers, client):
    """Returns a scheduler of rank 0 and its state. The servers are not supervised."""
    state = PoolState(servers)
    state.version = VERSION
    settings = configs.EngineSettings(servers=configs.ServerSettings(count=len(servers)))
    updates = WeightUpdates(client, sync_timeout_s=10.0)
    supervisor = Supervisor(state, updates, settings, keeps_weights=True, say=lambda _: None)
    availability = SupervisedAvailability(state, supervisor)
    return Scheduler(state, client, availability, max_sequences=8, retries=2), state


def test_request_is_retried_with_the_same_seed_after_a_malformed_response(scripted_server):
    scripted_server.responses += [
        (200, "<html>"),
        (200, '{"choices": [1]}'),
        (200, VALID_RESPONSE),
    ]

    async def sample(client):
        servers = [Server(url=scripted_server.url, up=True, version=VERSION) for _ in range(3)]
        scheduler, state = make_scheduler(servers, client)
        completions = await scheduler.sample(REQUEST, OPTIONS)
        return completions, state.counts["retried"]

    completions, num_retried = run_with_client(sample)
    assert len(completions) == 2
    assert num_retried == 2
    assert len(set(scripted_server.request_bodies)) == 1  # equal bodies have equal seeds


@pytest.mark.parametrize("text", ["<html>", "{}", '{"weight_version": 3}'])
def test_malformed_weight_version_is_an_engine_error(scripted_server, text):
    scripted_server.responses.append((200, text))

    async def read_version(client):
        return await client.weight_version(Server(url=scripted_server.url))

    with pytest.raises(MalformedResponseError, match="/weight_info"):
        run_with_client(read_version)


def test_number_of_generated_tokens_is_read_from_the_metrics(scripted_server):
    name = 'vllm:generation_tokens_total{engine="0",model_name="m"}'
    scripted_server.responses += [
        (200, f"# HELP\n{name} 42.0\nother 1\n"),
        (200, "nothing"),
        (200, f"{name} many\n"),
    ]

    async def read_three_times(client):
        server = Server(url=scripted_server.url)
        assert await client.num_generated_tokens(server, 5.0) == 42.0
        assert await client.num_generated_tokens(server, 5.0) == 0.0
        with pytest.raises(EngineError, match="'many' is not a number of tokens"):
            await client.num_generated_tokens(server, 5.0)

    run_with_client(read_three_times)
