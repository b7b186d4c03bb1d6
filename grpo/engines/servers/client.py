"""HTTP client for the servers of a pool.

A failed request raises a typed EngineError (grpo/engines/__init__.py). A rejected token is a
configuration error and raises UserError.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import httpx
import msgspec

from grpo.engines import (
    AbortedRequestError,
    EngineDeadError,
    IncompleteResponseError,
    MalformedResponseError,
    NoResponseError,
    RejectedRequestError,
    Request,
    SamplingOptions,
    ServerError,
    UnknownWeightVersionError,
)
from grpo.engines.servers.server import Server
from grpo.types import Completion, UserError

T = TypeVar("T")
CONNECT_TIMEOUT_S = 10.0
# The counter of generated tokens in the response of /metrics (Prometheus text format).
GENERATED_TOKENS = re.compile(r"^vllm:generation_tokens_total\S* (?P<count>\S+)$", re.MULTILINE)
GENERATE_PATH = "/inference/v1/generate"
MAX_ERROR_CHARACTERS = 300  # of a response's text in an error message
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class VersionSpan(msgspec.Struct):
    """The weight version that sampled the tokens `start` (inclusive) to `end` (exclusive)."""

    version: str
    start: int
    end: int


class TokenLogprob(msgspec.Struct):
    """Log-probability of one sampled token."""

    logprob: float


class ChoiceLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of a completion."""

    content: list[TokenLogprob]


class Choice(msgspec.Struct):
    """One completion in a response."""

    index: int
    finish_reason: str | None
    token_ids: list[TokenId] | None
    logprobs: ChoiceLogprobs | None
    stop_reason: int | str | None = None
    weight_versions: list[VersionSpan] | None = None


class GenerateResponse(msgspec.Struct):
    """Response of GENERATE_PATH. Keys without a field are ignored."""

    choices: list[Choice]


class WeightInfo(msgspec.Struct):
    """Response of /weight_info."""

    weight_version: str | None


class ServerClient:
    """Sends requests to the servers of a pool. Each call takes the server as an argument."""

    def __init__(
        self,
        *,
        token: str,
        token_env: str,
        timeout_s: float,
        decode: Callable[[Sequence[int]], str],
        cache_salt: str,
    ) -> None:
        """Creates the HTTP client. Opens no connection.

        Args:
            token: the bearer token of every request.
            token_env: the environment variable that holds the token, for error messages.
            timeout_s: the longest wait for a response; calls can override it.
            decode: converts token ids to text.
            cache_salt: separates the prefix cache entries of this run from those of other runs.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(headers=headers, limits=limits, trust_env=False)
        self._token_env = token_env
        self._timeout_s = timeout_s
        self._decode = decode
        self._cache_salt = cache_salt

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def get(
        self, server: Server, path: str, timeout_s: float | None = None
    ) -> httpx.Response:
        """Sends a GET request. Raises the same errors as `_request`."""
        return await self._request(server, "GET", path, timeout_s=timeout_s)

    async def post(
        self, server: Server, path: str, body: Any, timeout_s: float | None = None
    ) -> httpx.Response:
        """Sends a POST request with a JSON body. Raises the same errors as `_request`."""
        content = msgspec.json.encode(body)
        return await self._request(server, "POST", path, content=content, timeout_s=timeout_s)

    async def check_health(self, server: Server, timeout_s: float) -> None:
        """Returns normally if the server reports that it is healthy.

        Raises:
            EngineDeadError: The server reports that its engine is dead.
            EngineError: The server does not respond in time.
        """
        await self.get(server, "/health", timeout_s)

    async def num_generated_tokens(self, server: Server, timeout_s: float) -> float:
        """Returns the number of tokens generated since the server's start.

        It is 0 if the server does not report the number. Raises EngineError.
        """
        response = await self.get(server, "/metrics", timeout_s)
        match = GENERATED_TOKENS.search(response.text)
        if match is None:
            return 0.0
        try:
            return float(match["count"])
        except ValueError:
            raise MalformedResponseError(
                server.describe(), "/metrics", f"{match['count']!r} is not a number of tokens"
            ) from None

    async def weight_version(self, server: Server, timeout_s: float | None = None) -> str | None:
        """Returns the weight version that the engine of the server reports.

        The request reaches the engine process. A hanging engine does not respond to it, although
        the server may still respond to /health. Raises EngineError.
        """
        response = await self.get(server, "/weight_info", timeout_s)
        return _decode_json(server, "/weight_info", response, WeightInfo).weight_version

    async def generate(
        self, server: Server, request: Request, options: SamplingOptions, version: int
    ) -> tuple[Completion, ...]:
        """Samples the completions of one request and returns them in order.

        Args:
            server: the server that samples.
            request: the prompt, the seed and the number of completions.
            options: the sampling options.
            version: the current weight version; -1 accepts any weights.

        Raises:
            NoResponseError: The server did not respond.
            ServerError: The response has an error status.
            MalformedResponseError: The response cannot be decoded.
            IncompleteResponseError: The response has the wrong number of completions.
            AbortedRequestError: The server aborted a completion.
            UnknownWeightVersionError: Tokens were sampled with weights that were never sent.
        """
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": _sampling_params(request, options),
            "cache_salt": f"{self._cache_salt} {version}",
        }
        response = await self.post(server, GENERATE_PATH, body)
        choices = _decode_json(server, GENERATE_PATH, response, GenerateResponse).choices
        if len(choices) != request.n:
            raise IncompleteResponseError(server.url, len(choices), request.n)
        completions = []
        for choice in sorted(choices, key=lambda choice: choice.index):
            completion = self._to_completion(server, choice, version)
            min_version = min(span_version for span_version, _, _ in completion.versions)
            if version >= 0 and min_version < 0:
                raise UnknownWeightVersionError(server.url, version)
            completions.append(completion)
        return tuple(completions)

    def _to_completion(self, server: Server, choice: Choice, version: int) -> Completion:
        if choice.finish_reason not in ("stop", "length"):
            raise AbortedRequestError(server.url, choice.finish_reason)
        if choice.token_ids is None or choice.logprobs is None:
            raise MalformedResponseError(
                server.describe(), GENERATE_PATH, "a completion has no token_ids or no logprobs"
            )
        token_ids = tuple(choice.token_ids)
        logprobs = tuple(entry.logprob for entry in choice.logprobs.content)
        if len(logprobs) != len(token_ids):
            raise MalformedResponseError(
                server.describe(),
                GENERATE_PATH,
                f"a completion has {len(logprobs)} logprobs for {len(token_ids)} tokens",
            )
        stopped_by_string = isinstance(choice.stop_reason, str)
        text_ids = token_ids
        if choice.finish_reason == "stop" and not stopped_by_string:
            text_ids = token_ids[:-1]  # the text does not include the stop token
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._decode(text_ids),
            finish_reason=cast(Literal["stop", "length"], choice.finish_reason),
            versions=_version_spans(server, choice, len(token_ids), version),
        )

    async def _request(
        self,
        server: Server,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """Sends a request and returns its response, which has status 200.

        Raises:
            UserError: The server rejects the token.
            NoResponseError: The server did not respond in time, or the connection failed.
            ServerError: The response has an error status: RejectedRequestError for 4xx,
                EngineDeadError for 503.
        """
        if timeout_s is None:
            timeout_s = self._timeout_s
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            response = await self._http.request(
                method,
                server.url + path,
                content=content,
                headers={"Content-Type": "application/json"},
                timeout=timeout,
            )
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__} {error}".rstrip()
            raise NoResponseError(server.describe(), path, reason) from None
        server.last_response_at = time.monotonic()
        status = response.status_code
        if status == 200:
            return response
        if status in (401, 403):
            raise UserError(
                f"{server.url}{path}: the server rejected the token ({status}): set "
                f"{self._token_env} to the server's token"
            )
        if 400 <= status < 500:
            error_class: type[ServerError] = RejectedRequestError
        elif status == 503:
            error_class = EngineDeadError
        else:
            error_class = ServerError
        raise error_class(server.describe(), path, status, response.text[:MAX_ERROR_CHARACTERS])


def _parse_version(version: str) -> int:
    """Returns a weight version as a number, -1 for vLLM's initial version "default"."""
    try:
        return int(version)
    except ValueError:
        return -1


def _decode_json(server: Server, path: str, response: httpx.Response, response_type: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=response_type)
    except msgspec.MsgspecError as error:
        raise MalformedResponseError(server.describe(), path, str(error)) from None


def _sampling_params(request: Request, options: SamplingOptions) -> dict[str, Any]:
    params: dict[str, Any] = {
        "n": request.n,
        "seed": request.seed,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "stop_token_ids": list(options.stop_token_ids),
        "ignore_eos": options.ignore_eos,
        "logprobs": 0,  # of the sampled token only
        "skip_special_tokens": False,
    }
    if options.stop:
        params["stop"] = list(options.stop)
        params["include_stop_str_in_output"] = True
    else:
        params["detokenize"] = False  # vLLM needs the text only to find stop strings
    return params


def _version_spans(
    server: Server, choice: Choice, num_tokens: int, version: int
) -> tuple[tuple[int, int, int], ...]:
    """Returns the spans `(version, start, end)` of a completion: `((3, 0, 5), (4, 5, 9))`.

    A response without spans gets one span with `version`.

    Raises:
        MalformedResponseError: The spans do not cover every token exactly once.
    """
    spans = choice.weight_versions
    if not spans:
        return ((version, 0, num_tokens),)
    starts = [span.start for span in spans]
    ends = [span.end for span in spans]
    if starts != [0, *ends[:-1]] or ends[-1] != num_tokens:
        raise MalformedResponseError(
            server.describe(),
            GENERATE_PATH,
            f"the version spans of a completion do not cover its {num_tokens} tokens: {spans}",
        )
    return tuple((_parse_version(span.version), span.start, span.end) for span in spans)
