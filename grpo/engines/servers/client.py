"""HTTP to one server: a request in, completions out.

Every failure is a typed error (grpo/engines/__init__.py), except a wrong token, which is the user's
mistake.
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
    RefusedError,
    Request,
    SamplingOptions,
    ServerError,
    UnknownWeightVersionError,
)
from grpo.engines.servers.server import Server
from grpo.types import Completion, UserError

T = TypeVar("T")
CONNECT_LIMIT_S = 10.0
GENERATED_TOKENS = re.compile(r"^vllm:generation_tokens_total\S* (\S+)$", re.MULTILINE)
GENERATE = "/inference/v1/generate"
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class VersionSpan(msgspec.Struct):
    """Which weights sampled the tokens from `start` to `end`."""

    version: str
    start: int
    end: int


class TokenLogprob(msgspec.Struct):
    """The log-probability of one sampled token."""

    logprob: float


class ChoiceLogprobs(msgspec.Struct):
    """The log-probabilities of a completion's tokens."""

    content: list[TokenLogprob]


class Choice(msgspec.Struct):
    """One completion of an answer."""

    index: int
    finish_reason: str | None
    token_ids: list[TokenId] | None
    logprobs: ChoiceLogprobs | None
    stop_reason: int | str | None = None
    weight_versions: list[VersionSpan] | None = None


class GenerateResponse(msgspec.Struct):
    """The answer of GENERATE. Keys that are not named here are ignored."""

    choices: list[Choice]


class WeightInfo(msgspec.Struct):
    """The answer of /weight_info."""

    weight_version: str | None


class ServerClient:
    """Sends requests to the servers of a pool, one server per call."""

    def __init__(
        self,
        *,
        token: str,
        token_env: str,
        timeout_s: float,
        decode: Callable[[Sequence[int]], str],
        cache_salt: str,
    ) -> None:
        """Makes the HTTP client; connects to nothing yet.

        Args:
            token: what every request carries.
            token_env: the environment variable of the token, for a message.
            timeout_s: the longest wait for an answer, where a call names no other limit.
            decode: returns the text of tokens.
            cache_salt: keeps this run's prefixes in a server's cache apart from another run's.
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
        """Returns a server's answer to GET. Raises UserError and EngineError as `_request`."""
        return await self._request(server, "GET", path, timeout_s=timeout_s)

    async def post(
        self, server: Server, path: str, body: Any, timeout_s: float | None = None
    ) -> httpx.Response:
        """Returns a server's answer to POST. Raises UserError and EngineError as `_request`."""
        content = msgspec.json.encode(body)
        return await self._request(server, "POST", path, content=content, timeout_s=timeout_s)

    async def check_health(self, server: Server, timeout_s: float) -> None:
        """Returns when the server answers that it is well.

        Raises EngineDeadError if its engine is dead, another EngineError if it does not answer.
        """
        await self.get(server, "/health", timeout_s)

    async def num_generated_tokens(self, server: Server, timeout_s: float) -> float:
        """Returns how many tokens the server has generated since its start. Raises EngineError."""
        response = await self.get(server, "/metrics", timeout_s)
        match = GENERATED_TOKENS.search(response.text)
        if match is None:
            return 0.0
        try:
            return float(match[1])
        except ValueError:
            raise MalformedResponseError(
                server.describe(), "/metrics", f"{match[1]!r} is not a number of tokens"
            ) from None

    async def weight_version(self, server: Server, timeout_s: float | None = None) -> str | None:
        """Returns the version of the weights that the server's engine holds.

        It asks the engine: one that hangs does not answer, while /health still does. Raises
        EngineError.
        """
        response = await self.get(server, "/weight_info", timeout_s)
        return _decode_json(server, "/weight_info", response, WeightInfo).weight_version

    async def generate(
        self, server: Server, request: Request, options: SamplingOptions, version: int
    ) -> tuple[Completion, ...]:
        """Returns a request's completions in order.

        Args:
            server: which one to ask.
            request: the prompt, its seed and how many completions.
            options: how to sample.
            version: of the weights that the server should sample with; -1 for its own.

        Raises:
            EngineError: no answer, or one that cannot be used: every case has its own class.
        """
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": _sampling_params(request, options),
            "cache_salt": f"{self._cache_salt} {version}",
        }
        response = await self.post(server, GENERATE, body)
        choices = _decode_json(server, GENERATE, response, GenerateResponse).choices
        if len(choices) != request.n:
            raise IncompleteResponseError(server.url, len(choices), request.n)
        completions = []
        for choice in sorted(choices, key=lambda choice: choice.index):
            completion = self._completion(server, choice, version)
            if version >= 0 and any(number < 0 for number, _, _ in completion.versions):
                raise UnknownWeightVersionError(server.url, version)
            completions.append(completion)
        return tuple(completions)

    def _completion(self, server: Server, choice: Choice, version: int) -> Completion:
        if choice.finish_reason not in ("stop", "length"):
            raise AbortedRequestError(server.url, choice.finish_reason)
        if choice.token_ids is None or choice.logprobs is None:
            raise MalformedResponseError(
                server.describe(), GENERATE, "a completion without token_ids or logprobs"
            )
        token_ids = tuple(choice.token_ids)
        logprobs = tuple(entry.logprob for entry in choice.logprobs.content)
        if len(logprobs) != len(token_ids):
            raise MalformedResponseError(
                server.describe(),
                GENERATE,
                f"{len(logprobs)} logprobs of a completion of {len(token_ids)} tokens",
            )
        ended_by_token = choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str)
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._decode(token_ids[:-1] if ended_by_token else token_ids),
            finish_reason=cast(Literal["stop", "length"], choice.finish_reason),
            versions=_versions(server, choice, len(token_ids), version),
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
        """Returns a server's answer with status 200.

        Raises:
            UserError: the server refuses the token.
            EngineError: the server refuses the request, fails, or does not answer in time.
        """
        timeout = httpx.Timeout(timeout_s or self._timeout_s, connect=CONNECT_LIMIT_S)
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
                f"{server.url}{path} refuses our token ({status}): set {self._token_env} to the "
                "server's own"
            )
        error_class = ServerError
        if 400 <= status < 500:
            error_class = RefusedError
        elif status == 503:
            error_class = EngineDeadError
        raise error_class(server.describe(), path, status, response.text[:300])


def parse_version(version: str | None) -> int:
    """Returns a server's weight version as a number, -1 for vLLM's own name ("default")."""
    try:
        return int(version or "")
    except ValueError:
        return -1


def _decode_json(server: Server, path: str, response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
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
        "logprobs": 0,
        "skip_special_tokens": False,
    }
    if options.stop:
        params["stop"] = list(options.stop)
        params["include_stop_str_in_output"] = True
    else:
        params["detokenize"] = False
    return params


def _versions(
    server: Server, choice: Choice, num_tokens: int, version: int
) -> tuple[tuple[int, int, int], ...]:
    """Returns a completion's spans `(version, start, end)`, one of `version` if it has none."""
    if not choice.weight_versions:
        return ((version, 0, num_tokens),)
    spans = []
    covered = 0
    for span in choice.weight_versions:
        if span.start != covered:
            break
        spans.append((parse_version(span.version), span.start, span.end))
        covered = span.end
    if covered != num_tokens or len(spans) != len(choice.weight_versions):
        raise MalformedResponseError(
            server.describe(),
            GENERATE,
            f"the versions of a completion's {num_tokens} tokens have gaps: "
            f"{choice.weight_versions}",
        )
    return tuple(spans)
