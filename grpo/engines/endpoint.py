"""Any OpenAI-compatible endpoint as a source of completions: a teacher that somebody else serves.

Text in, text out; no weights are sent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grpo.engines import EngineError, SamplingOptions
from grpo.types import Completion, UserError

if TYPE_CHECKING:
    from grpo.config import Teacher

THOUGHTS = ("reasoning_content", "reasoning")  # where servers put what a reasoning model thinks


class Endpoint:
    """Samples completions from the model that an OpenAI-compatible endpoint serves."""

    def __init__(self, teacher: Teacher, on_wait: Callable[[], None] = lambda: None) -> None:
        """`on_wait` is called five times a second while waiting and may raise.

        Raises UserError when the key's variable is not set, or nothing answers at the address.
        """
        import openai

        key = os.environ.get(teacher.api_key_env) if teacher.api_key_env else "none"
        if not key:
            raise UserError(f"teacher.api_key_env: {teacher.api_key_env} is not set")
        self._teacher = teacher
        self._on_wait = on_wait
        self._client = openai.OpenAI(
            base_url=teacher.url,
            api_key=key,
            timeout=openai.Timeout(teacher.timeout_s, connect=10),
            max_retries=teacher.retries,
        )
        try:
            served = [
                model.id
                for model in self._client.with_options(timeout=10, max_retries=1).models.list()
            ]
        except openai.OpenAIError as error:
            raise UserError(f"teacher.url={teacher.url}: {_describe(error)}") from None
        if served and teacher.model not in served:
            raise UserError(
                f"teacher.model={teacher.model}: not served at {teacher.url}; have "
                f"{', '.join(served[:10])}"
            )

    def generate(
        self,
        requests: Sequence[tuple[list[dict[str, str]], int, int]],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of requests `(messages, seed, n)`, in order.

        Raises EngineError after the last retry.
        """
        tasks = _tasks([n for _, _, n in requests])
        completions: list[list[Completion | None]] = [[None] * n for _, _, n in requests]
        total = tasks.qsize()
        done = 0
        answers: queue.SimpleQueue[tuple[int, int, Completion | Exception]] = queue.SimpleQueue()
        given_up = threading.Event()

        def work() -> None:
            while not given_up.is_set():
                try:
                    r, i = tasks.get_nowait()
                except queue.Empty:
                    return
                messages, seed, _ = requests[r]
                try:
                    answers.put((r, i, self._complete(messages, seed + i, options)))
                except Exception as error:
                    answers.put((r, i, error))

        for _ in range(min(total, self._teacher.concurrency)):
            # a request that is given up is not waited for
            threading.Thread(target=work, daemon=True).start()
        try:
            while done < total:
                self._on_wait()
                with contextlib.suppress(queue.Empty):
                    r, i, answer = answers.get(timeout=0.2)
                    if isinstance(answer, Exception):
                        raise answer
                    completions[r][i] = answer
                    done += 1
                    if on_progress:
                        on_progress(done, total)
        finally:
            given_up.set()
        return [
            tuple(completion for completion in row if completion is not None) for row in completions
        ]

    def _complete(
        self, messages: list[dict[str, str]], seed: int, options: SamplingOptions
    ) -> Completion:
        import openai

        optional: dict[str, Any] = {}
        if options.stop:
            optional["stop"] = list(options.stop)
        if options.top_k:
            optional["extra_body"] = {"top_k": options.top_k}
        try:
            answer = self._client.chat.completions.create(
                model=self._teacher.model,
                messages=messages,  # type: ignore[arg-type]
                seed=seed % 2**31,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                **optional,
            )
        except openai.OpenAIError as error:
            raise EngineError(f"teacher {self._teacher.url}: {_describe(error)}") from None
        if not answer.choices:
            raise EngineError(f"teacher {self._teacher.url}: an answer without a completion")
        choice = answer.choices[0]
        text = choice.message.content or ""
        thoughts = _thoughts(choice.message)
        if thoughts:
            text = f"<think>\n{thoughts.strip()}\n</think>\n{text.lstrip()}"
        # vLLM says which stop string it cut off; ours keeps it
        stop = getattr(choice, "stop_reason", None)
        if isinstance(stop, str) and stop in options.stop:
            text += stop
        # it gives no ids: as many places as tokens
        tokens = answer.usage.completion_tokens if answer.usage else len(text.split())
        return Completion(
            token_ids=(0,) * tokens,
            logprobs=(),
            text=text,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            versions=((0, 0, tokens),),
        )


def _tasks(counts: Sequence[int]) -> queue.SimpleQueue[tuple[int, int]]:
    """Returns (request, number of the completion) of every completion that requests ask for."""
    tasks: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for request, count in enumerate(counts):
        for number in range(count):
            tasks.put((request, number))
    return tasks


def _describe(error: Exception) -> str:
    """Returns the class of an error and the first line of its cause."""
    message = str(error.__cause__ or error)
    first_line = message.splitlines()[0][:200] if message else str(error)
    return f"{type(error).__name__}: {first_line}"


def _thoughts(message: Any) -> str | None:
    """Returns the thoughts that a server keeps apart from the text, None if there are none."""
    for key in THOUGHTS:
        thoughts: str | None = getattr(message, key, None)
        if thoughts:
            return thoughts
    return None
