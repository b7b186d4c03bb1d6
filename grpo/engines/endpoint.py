"""Any OpenAI-compatible endpoint as a source of completions: a teacher that somebody else serves.

Text in, text out, no weights of ours.
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
        self._teacher, self._on_wait = teacher, on_wait
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
            raise UserError(f"teacher.url={teacher.url}: {_told(error)}") from None
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
        tasks = iter([(r, i) for r, (*_, n) in enumerate(requests) for i in range(n)])
        total, done = sum(n for *_, n in requests), 0
        found: list[list[Completion | None]] = [[None] * n for *_, n in requests]
        answers: queue.SimpleQueue[tuple[int, int, Completion | Exception]] = queue.SimpleQueue()
        given_up = threading.Event()

        def work() -> None:
            while not given_up.is_set():
                with lock:
                    r, i = next(tasks, (-1, -1))
                if r < 0:
                    return
                try:
                    answers.put((r, i, self._one(requests[r][0], requests[r][1] + i, options)))
                except Exception as error:
                    answers.put((r, i, error))

        lock = threading.Lock()
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
                    found[r][i] = answer
                    done += 1
                    if on_progress:
                        on_progress(done, total)
        finally:
            given_up.set()
        return [tuple(completion for completion in row if completion is not None) for row in found]

    def _one(
        self, messages: list[dict[str, str]], seed: int, options: SamplingOptions
    ) -> Completion:
        import openai

        more: dict[str, Any] = {"stop": list(options.stop)} if options.stop else {}
        if options.top_k:
            more["extra_body"] = {"top_k": options.top_k}
        try:
            answer = self._client.chat.completions.create(
                model=self._teacher.model,
                messages=messages,  # type: ignore[arg-type]
                seed=seed % 2**31,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                **more,
            )
        except openai.OpenAIError as error:
            raise EngineError(f"teacher {self._teacher.url}: {_told(error)}") from None
        choice = answer.choices[0]
        text = choice.message.content or ""
        thoughts = next(
            (value for key in THOUGHTS if (value := getattr(choice.message, key, None))), None
        )
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


def _told(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(error).__name__}: {str(cause).splitlines()[0][:200] if str(cause) else error}"
