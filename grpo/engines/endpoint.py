"""Samples completions from an OpenAI-compatible endpoint, for a teacher or for evaluation.

The endpoint receives chat messages and returns text. It has its own weights: none are sent to it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo.engines import EngineError, SamplingOptions
from grpo.types import Completion, UserError

if TYPE_CHECKING:
    from grpo.config import EndpointSettings

# The fields of a message in which servers return the reasoning of a model.
REASONING_FIELDS = ("reasoning_content", "reasoning")
MAX_LISTED_MODELS = 10  # in an error message
MAX_ERROR_CHARACTERS = 200  # of a cause in an error message
POLL_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Task:
    """One completion to sample: completion `completion_index` of request `request_index`."""

    request_index: int
    completion_index: int
    messages: list[dict[str, str]]
    seed: int


@dataclass(frozen=True, slots=True)
class _Result:
    """The completion of a task, or the error that it raised."""

    task: _Task
    value: Completion | Exception


class Endpoint:
    """Samples completions from the model that an OpenAI-compatible endpoint serves."""

    def __init__(
        self, settings: EndpointSettings, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Connects to the endpoint.

        Args:
            settings: the section `teacher` or `endpoint` of the config.
            on_wait: called five times per second while `generate` waits; may raise.

        Raises:
            UserError: The variable of the API key is not set, the endpoint does not respond, or it
                does not serve the model.
        """
        import openai

        api_key: str | None = "none"  # the client requires a key
        if settings.api_key_env:
            api_key = os.environ.get(settings.api_key_env)
        if not api_key:
            raise UserError(
                f"endpoint {settings.url}: the environment variable {settings.api_key_env} is not "
                "set (api_key_env)"
            )
        self._settings = settings
        self._on_wait = on_wait
        self._client = openai.OpenAI(
            base_url=settings.url,
            api_key=api_key,
            timeout=openai.Timeout(settings.timeout_s, connect=10),
            max_retries=settings.retries,
        )
        self._check_model()

    def _check_model(self) -> None:
        """Raises UserError if the endpoint does not respond or does not serve the model."""
        import openai

        settings = self._settings
        client = self._client.with_options(timeout=10, max_retries=1)
        try:
            models = [model.id for model in client.models.list()]
        except openai.OpenAIError as error:
            raise UserError(f"endpoint {settings.url}: {_describe(error)}") from None
        if models and settings.model not in models:
            raise UserError(
                f"endpoint {settings.url}: does not serve the model {settings.model!r}. "
                f"Available: {', '.join(models[:MAX_LISTED_MODELS])}"
            )

    def generate(
        self,
        requests: Sequence[tuple[list[dict[str, str]], int, int]],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each request, in the order of the requests.

        Completion i of a request has the seed `seed + i`.

        Args:
            requests: `(messages, seed, num_completions)` per request:
                `[([{"role": "user", "content": "2+3="}], 7, 2)]`.
            options: the sampling options.
            on_progress: called as `on_progress(num_finished, num_total)`, in completions.

        Raises:
            EngineError: A completion failed after the last retry.
        """
        tasks = _completion_tasks(requests)
        num_tasks = tasks.qsize()
        results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        stop = threading.Event()
        for _ in range(min(num_tasks, self._settings.concurrency)):
            # Daemon threads: a request that is abandoned does not keep the process alive.
            arguments = (tasks, results, stop, options)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        completions: dict[tuple[int, int], Completion] = {}
        try:
            while len(completions) < num_tasks:
                self._on_wait()
                try:
                    result = results.get(timeout=POLL_INTERVAL_S)
                except queue.Empty:
                    continue
                if isinstance(result.value, Exception):
                    raise result.value
                task = result.task
                completions[task.request_index, task.completion_index] = result.value
                if on_progress is not None:
                    on_progress(len(completions), num_tasks)
        finally:
            stop.set()
        return [
            tuple(completions[i, j] for j in range(num_completions))
            for i, (_, _, num_completions) in enumerate(requests)
        ]

    def _work(
        self,
        tasks: queue.SimpleQueue[_Task],
        results: queue.SimpleQueue[_Result],
        stop: threading.Event,
        options: SamplingOptions,
    ) -> None:
        """Runs tasks until the queue is empty or `stop` is set."""
        while not stop.is_set():
            try:
                task = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                value: Completion | Exception = self._complete(task.messages, task.seed, options)
            except Exception as error:
                value = error
            results.put(_Result(task, value))

    def _complete(
        self, messages: list[dict[str, str]], seed: int, options: SamplingOptions
    ) -> Completion:
        """Requests one completion. Raises EngineError."""
        import openai

        optional: dict[str, Any] = {}
        if options.stop:
            optional["stop"] = list(options.stop)
        if options.top_k:
            optional["extra_body"] = {"top_k": options.top_k}
        try:
            response = self._client.chat.completions.create(
                model=self._settings.model,
                messages=messages,  # type: ignore[arg-type]
                seed=seed % 2**31,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                **optional,
            )
        except openai.OpenAIError as error:
            raise EngineError(f"endpoint {self._settings.url}: {_describe(error)}") from None
        if not response.choices:
            raise EngineError(f"endpoint {self._settings.url}: the response has no completion")
        choice = response.choices[0]
        text = _text(choice, options.stop)
        num_tokens = len(text.split())  # an estimate, for servers that do not report the number
        if response.usage:
            num_tokens = response.usage.completion_tokens
        return Completion(
            # The endpoint returns no token ids. The zeros only give the number of tokens.
            token_ids=(0,) * num_tokens,
            logprobs=(),
            text=text,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            versions=((0, 0, num_tokens),),
        )


def _completion_tasks(
    requests: Sequence[tuple[list[dict[str, str]], int, int]],
) -> queue.SimpleQueue[_Task]:
    """Returns one task per completion, in the order of the requests."""
    tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
    for request_index, (messages, seed, num_completions) in enumerate(requests):
        for completion_index in range(num_completions):
            tasks.put(_Task(request_index, completion_index, messages, seed + completion_index))
    return tasks


def _text(choice: Any, stop_strings: Sequence[str]) -> str:
    """Returns the text of a completion, with its reasoning in `<think>` and its stop string."""
    text: str = choice.message.content or ""
    reasoning = _reasoning(choice.message)
    if reasoning:
        text = f"<think>\n{reasoning.strip()}\n</think>\n{text.lstrip()}"
    # vLLM removes the stop string from the text and reports it. grpo's completions include it.
    stop_reason = getattr(choice, "stop_reason", None)
    if isinstance(stop_reason, str) and stop_reason in stop_strings:
        text += stop_reason
    # JSON can contain lone surrogates, which cannot be encoded. They become U+FFFD, as in vLLM.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reasoning(message: Any) -> str | None:
    """Returns the reasoning that a server returns separately from the text, None if it has none."""
    for field in REASONING_FIELDS:
        reasoning: str | None = getattr(message, field, None)
        if reasoning:
            return reasoning
    return None


def _describe(error: Exception) -> str:
    """Returns an error's class and the first line of its cause: "APITimeoutError: timed out"."""
    error_class = type(error).__name__
    cause = str(error.__cause__ or error)
    if not cause:
        return f"{error_class}: {error}"
    return f"{error_class}: {cause.splitlines()[0][:MAX_ERROR_CHARACTERS]}"
