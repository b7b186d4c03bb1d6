"""Renders prompts: templates, system prompts, the `<think>` prefill, and what ends a completion.

`Prompts` renders text and token ids with a model's tokenizer. `ChatPrompts` renders messages for a
model behind an endpoint, whose tokenizer is not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo import files
from grpo.types import Problem, UserError, first_line

# DeepSeek-R1, Table 1, without its full stop after the question: a question has its own.
R1_ZERO = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves "
    "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
    "User with the answer. The reasoning process and answer are enclosed within <think>...</think> "
    "and <answer>...</answer> tags, respectively, that is, <think>reasoning process here </think> "
    "<answer> answer here </answer>. User: {question} Assistant:"
)
# Built-in system prompts, by their names in `prompt.system`.
SYSTEM = {
    "r1": "First think about the problem step by step inside <think> and </think>, then give only "
    "the final answer inside <answer> and </answer>, like this: <think>your reasoning</think> "
    "<answer>42</answer>"
}
EXAMPLE = Problem(id="example", question="What is 2 + 3?", answer="5", source="example")
TEMPLATES = ("chat", "r1_zero", "plain")


class Prompts:
    """Renders problems for one tokenizer.

    Attributes:
        stop: Stop strings, which end a completion.
        stop_token_ids: Stop tokens, which end a completion.
        end_id: The token that ends a worked solution: the chat template's end-of-turn token, or
            EOS. None without one.
    """

    def __init__(
        self,
        settings: configs.PromptSettings,
        tokenizer: Any,
        eos_token_ids: list[int] | None = None,
    ) -> None:
        """Checks that the template can be rendered.

        Args:
            settings: The config section `prompt`.
            tokenizer: The model's tokenizer. It gets the template of `prompt.chat_template`.
            eos_token_ids: The EOS tokens of the model's generation config.

        Raises:
            UserError: The template is unknown or does not work with this tokenizer, or no token and
                no string would end a completion.
        """
        if settings.chat_template is not None:
            tokenizer.chat_template = _read_chat_template(settings)
        _check_template(settings, tokenizer)
        self._settings = settings
        self._tokenizer = tokenizer
        self.end_id = self._find_end_of_turn_id() or tokenizer.eos_token_id
        stop_ids = {tokenizer.eos_token_id, *(eos_token_ids or []), self.end_id}
        self.stop_token_ids = tuple(sorted(token for token in stop_ids if token is not None))
        if not self.stop_token_ids and not settings.stop:
            raise UserError(
                "neither the tokenizer nor the model defines an EOS token, so completions would "
                "not end before sampling.max_tokens: set prompt.stop"
            )
        try:
            self.text(EXAMPLE)
        except Exception as error:  # A chat template is a program and can raise anything.
            raise UserError(
                "prompt: the tokenizer's chat template cannot be rendered with these settings: "
                f"{type(error).__name__}: {error}"
            ) from None
        self.stop = tuple(settings.stop)
        if settings.template == "r1_zero":
            self.stop = (*self.stop, "</answer>")

    def text(self, problem: Problem) -> str:
        """Returns the prompt as text, including the `<think>` prefill if it is configured."""
        prefill = "<think>\n"
        if self._settings.template == "chat":
            text = self._apply_chat_template(problem)
        elif self._settings.template == "r1_zero":
            text = R1_ZERO.replace("{question}", problem.question)
            prefill = " <think>"
        else:
            text = f"{problem.question}\n"
        if self._settings.think_prefill and not text.rstrip().endswith("<think>"):
            text += prefill
        return text

    def _apply_chat_template(self, problem: Problem) -> str:
        text: str = self._tokenizer.apply_chat_template(
            self.messages(problem), tokenize=False, add_generation_prompt=True
        )
        return text

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the chat messages: the system prompt, if configured, and the question."""
        return ChatPrompts(self._settings).messages(problem)

    def reward_prompt(self, problem: Problem) -> str | list[dict[str, str]]:
        """Returns the prompt as TRL's reward functions expect it.

        It is a list of messages for a chat template, and text for any other template.
        """
        if self._settings.template == "chat":
            return self.messages(problem)
        return self.text(problem)

    def prefill(self, problem: Problem) -> str:
        """Returns the end of the prompt that rewards read as the start of the completion.

        It is `<think>` and the whitespace after it, or "" if the prompt does not end with them.
        """
        text = self.text(problem)
        if not text.rstrip().endswith("<think>"):
            return ""
        return text[text.rindex("<think>") :]

    def token_ids(self, problem: Problem) -> tuple[int, ...]:
        """Returns the token ids of the prompt.

        A chat template contains its special tokens. For the other templates the tokenizer adds its
        BOS token, if it has one; an EOS token that it appends is removed.
        """
        has_chat_template = self._settings.template == "chat"
        encoding = self._tokenizer(self.text(problem), add_special_tokens=not has_chat_template)
        ids = encoding["input_ids"]
        if not has_chat_template and ids[-1] == self._tokenizer.eos_token_id:
            ids = ids[:-1]
        return tuple(ids)

    def hinted_token_ids(self, problem: Problem, hint: str, max_tokens: int) -> tuple[int, ...]:
        """Returns the token ids of a prompt with a hint after the question, for a teacher.

        Args:
            problem: The problem.
            hint: The hint, e.g. `"Feedback on an earlier attempt: format: no answer"`.
            max_tokens: Maximum length of the hint in tokens. A longer one is cut off at its end.
        """
        hint_ids = self._tokenizer(hint, add_special_tokens=False)["input_ids"]
        if len(hint_ids) > max_tokens:
            hint = self._tokenizer.decode(hint_ids[:max_tokens])
        question = f"{problem.question}\n\n{hint}\n\nSolve the problem yourself."
        return self.token_ids(replace(problem, question=question))

    def solution_ids(self, problem: Problem) -> tuple[int, ...]:
        """Returns the token ids of a worked solution, the target of supervised fine-tuning.

        The last token ends a completion: the chat template's end-of-turn token, or EOS.
        """
        ids = self._tokenizer(self.solution(problem), add_special_tokens=False)["input_ids"]
        if self.end_id is None:
            return tuple(ids)
        return (*ids, self.end_id)

    def solution(self, problem: Problem) -> str:
        """Returns the text of a worked solution, as it follows the prompt.

        A solution without `<think>` becomes `<think>solution</think> <answer>answer</answer>`. A
        `<think>` that the prompt prefills is not repeated.
        """
        solution = problem.solution or ""
        if "<think>" not in solution:
            solution = f"<think>{solution}</think> <answer>{problem.answer}</answer>"
        if self.prefill(problem):
            solution = solution.lstrip().removeprefix("<think>").lstrip()
        return solution

    def chat_template_to_save(self) -> str:
        """Returns the chat template to save with a trained model.

        A server that applies it renders the same prompts as the training. For `prompt.template:
        chat` it is the tokenizer's template, with the prefill of `prompt.think_prefill`. For any
        other template it is that one, applied to the last message: the tokenizer of a base model
        often has a chat template, too, on which the model was not trained.
        """
        if self._settings.template != "chat":
            return self._as_chat_template()
        chat_template: str = self._tokenizer.chat_template
        if not self._settings.think_prefill or self._apply_chat_template(EXAMPLE).rstrip().endswith(
            "<think>"
        ):
            return chat_template
        return chat_template + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"

    def _as_chat_template(self) -> str:
        """Returns the template `r1_zero` or `plain` as a Jinja chat template."""
        template = self.text(EXAMPLE).replace(EXAMPLE.question, "{{ messages[-1]['content'] }}")
        bos_id = self._tokenizer.bos_token_id
        if bos_id is not None and self.token_ids(EXAMPLE)[0] == bos_id:
            template = "{{ bos_token }}" + template
        if template.endswith("\n"):  # Jinja removes a newline at the end of a template.
            template = template.removesuffix("\n") + "{{ '\\n' }}"
        return template

    def without_overlong(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Returns the problems whose prompts have at most `prompt.max_tokens` tokens.

        Raises:
            UserError: A prompt is longer, and `prompt.overlong` is `error`.
        """
        long_prompts = self._long_prompts(problems)
        if not long_prompts:
            return problems
        if self._settings.overlong == "error":
            longest = max(long_prompts, key=lambda index: long_prompts[index])
            num_tokens = long_prompts[longest]
            raise UserError(
                f"{len(long_prompts)} of {len(problems)} prompts are longer than "
                f"prompt.max_tokens={self._settings.max_tokens}. The longest, "
                f"{problems[longest].id}, has {num_tokens} tokens. Set "
                f"prompt.max_tokens={num_tokens}, or drop these problems with prompt.overlong=drop."
            )
        return [problem for index, problem in enumerate(problems) if index not in long_prompts]

    def _long_prompts(self, problems: Sequence[Problem]) -> dict[int, int]:
        """Returns the number of tokens of each prompt over the limit, by index of its problem.

        A token has at least one byte, so a prompt with at most `max_tokens` bytes is not tokenized.
        """
        max_tokens = self._settings.max_tokens
        empty_problem = Problem(id="", question="", answer="", source="")
        template_bytes = len(self.text(empty_problem).encode())
        long_prompts = {}
        for index, problem in enumerate(problems):
            if len(problem.question.encode()) + template_bytes <= max_tokens:
                continue
            num_tokens = len(self.token_ids(problem))
            if num_tokens > max_tokens:
                long_prompts[index] = num_tokens
        return long_prompts

    def _find_end_of_turn_id(self) -> int | None:
        """Returns the special token that the chat template writes after an assistant message.

        It often differs from the EOS token of a base model. None if the template is not `chat` or
        writes no special token there.
        """
        if self._settings.template != "chat":
            return None
        marker = "@@"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        end_of_turn = text.rpartition(marker)[2].strip()
        ids = self._tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]
        if not ids or ids[0] not in self._tokenizer.all_special_ids:
            return None
        end_of_turn_id: int = ids[0]
        return end_of_turn_id


def _read_chat_template(settings: configs.PromptSettings) -> str:
    path = str(settings.chat_template)
    if settings.template != "chat":
        raise UserError(
            f"prompt.chat_template={path} requires prompt.template=chat, but prompt.template is "
            f"{settings.template}"
        )
    try:
        return files.find_file(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt.chat_template={path}: {Path(path).expanduser().absolute()} cannot be read: "
            f"{first_line(error)}"
        ) from None


def _check_template(settings: configs.PromptSettings, tokenizer: Any) -> None:
    if settings.template not in TEMPLATES:
        raise UserError(
            f"prompt.template={settings.template}: unknown template. Available: "
            f"{', '.join(TEMPLATES)}."
        )
    if settings.template == "chat" and tokenizer.chat_template is None:
        raise UserError(
            "prompt.template=chat: this tokenizer has no chat template (is it a base model?). Use "
            "prompt.template=r1_zero or plain, or set prompt.chat_template to a Jinja file."
        )
    if settings.template != "chat" and settings.system:
        raise UserError(
            "prompt.system requires prompt.template=chat, but prompt.template is "
            f"{settings.template}"
        )


class ChatPrompts:
    """Renders problems as messages, for a model behind an OpenAI-compatible endpoint.

    The endpoint applies its own template and stop tokens. Prompts are not checked for their length.

    Attributes:
        stop: Stop strings, which end a completion.
        stop_token_ids: Always empty.
    """

    def __init__(self, settings: configs.PromptSettings) -> None:
        """`settings`: the config section `prompt`. Only `system` and `stop` are used."""
        self.stop = tuple(settings.stop)
        self.stop_token_ids: tuple[int, ...] = ()
        self._system = settings.system

    def reward_prompt(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the messages, the form in which TRL's reward functions expect a chat prompt."""
        return self.messages(problem)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the system prompt, if configured, and the question as messages."""
        question = {"role": "user", "content": problem.question}
        if not self._system:
            return [question]
        return [{"role": "system", "content": SYSTEM.get(self._system, self._system)}, question]

    def without_overlong(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Returns all problems, because their lengths in tokens are unknown."""
        return problems


def mark_special_tokens(text: str, tokenizer: Any) -> str:
    """Returns a rendered prompt with visible special tokens and line ends, for `--dry-run`.

    Special tokens are enclosed in ⟦ ⟧, and ⏎ marks the end of a line.
    """
    for token in sorted(set(tokenizer.all_special_tokens), key=len, reverse=True):
        text = text.replace(token, f"⟦{token}⟧")
    return text.replace("\n", "⏎\n")
