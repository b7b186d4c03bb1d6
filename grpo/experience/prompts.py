"""Everything about the text around a problem.

Templates, system prompts, the `<think>` prefill, stop strings and end-of-turn tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo import config as configs
from grpo.types import Problem, UserError

# DeepSeek-R1, Table 1, verbatim; the question brings its own full stop.
R1_ZERO = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves "
    "it. The Assistant first thinks about "
    "the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process and answer are enclosed within "
    "<think>...</think> and <answer>...</answer> tags, respectively, that is, <think>reasoning "
    "process here </think> <answer> answer here "
    "</answer>. User: {question} Assistant:"
)
SYSTEM = {
    "r1": "First think about the problem step by step inside <think> and "
    "</think>, then give only the final answer inside <answer> and "
    "</answer>, like this: <think>your reasoning</think> <answer>42</answer>"
}
EXAMPLE = Problem(id="example", question="What is 2 + 3?", answer="5", source="example")
TEMPLATES = ("chat", "r1_zero", "plain")


class Prompts:
    """Renders problems for one tokenizer.

    `stop` and `stop_token_ids` end a completion; `text` and `ids` are the prompt.
    """

    def __init__(
        self, settings: configs.Prompt, tokenizer: Any, eos_token_ids: list[int] | None = None
    ) -> None:
        """`eos_token_ids`: the model's own, from its generation config.

        Raises UserError for a template that cannot be rendered.
        """
        self._settings, self._tokenizer = settings, tokenizer
        if settings.template not in TEMPLATES:
            raise UserError(
                f"prompt.template={settings.template}: no such template; have "
                f"{', '.join(TEMPLATES)}"
            )
        if settings.template == "chat" and tokenizer.chat_template is None:
            raise UserError(
                "prompt.template=chat: this tokenizer has no chat template (a base model?): use "
                "r1_zero or plain"
            )
        if settings.template != "chat" and settings.system:
            raise UserError(
                f"prompt.system is for chat templates; prompt.template is {settings.template}"
            )
        self._turn_end = self._end_of_turn()
        ends = {tokenizer.eos_token_id, *(eos_token_ids or []), self._turn_end}
        self.stop_token_ids = tuple(sorted(end for end in ends if end is not None))
        if not self.stop_token_ids and not settings.stop:
            raise UserError(
                "neither the tokenizer nor the model names an EOS token: completions would never "
                "end; set prompt.stop"
            )
        try:
            self.text(EXAMPLE)
        except Exception as error:  # a template is a program of somebody else's
            raise UserError(
                f"prompt: this tokenizer's chat template refuses it: {type(error).__name__}: "
                f"{error}"
            ) from None
        self.stop = (*settings.stop, *(("</answer>",) if settings.template == "r1_zero" else ()))

    def text(self, problem: Problem) -> str:
        """Returns the prompt as text, with the prefilled `<think>` at its end if there is one."""
        settings = self._settings
        if settings.template == "chat":
            text: str = self._tokenizer.apply_chat_template(
                self.messages(problem), tokenize=False, add_generation_prompt=True
            )
        else:
            text = {"r1_zero": R1_ZERO, "plain": "{question}\n"}[settings.template].replace(
                "{question}", problem.question
            )
        if settings.think_prefill and not text.rstrip().endswith("<think>"):
            text += " <think>" if settings.template == "r1_zero" else "<think>\n"
        return text

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns a chat's messages: the system prompt, if any, and the question."""
        return Chat(self._settings).messages(problem)

    def for_rewards(self, problem: Problem) -> str | list[dict[str, str]]:
        """Returns the prompt as TRL's reward functions expect it.

        It is a list of messages for a chat template, else text.
        """
        return self.messages(problem) if self._settings.template == "chat" else self.text(problem)

    def prefill(self, problem: Problem) -> str:
        """Returns the part of the prompt that belongs to the completion when it is judged.

        It is `<think>` and what follows it, or nothing.
        """
        text = self.text(problem)
        return text[text.rindex("<think>") :] if text.rstrip().endswith("<think>") else ""

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """Returns the prompt's tokens.

        A chat template writes its own special tokens; for the others the tokenizer adds its BOS, if
        any.
        """
        ids = self._tokenizer(
            self.text(problem), add_special_tokens=self._settings.template != "chat"
        )["input_ids"]
        return tuple(
            ids[:-1]
            if ids[-1] == self._tokenizer.eos_token_id and self._settings.template != "chat"
            else ids
        )

    def target_ids(self, problem: Problem) -> tuple[int, ...]:
        """Returns the tokens of a worked solution as SFT teaches it.

        They are thoughts and answer in their tags, then the end of the turn.

        A solution with tags stands as it is; another is
        `<think>solution</think> <answer>answer</answer>`. What the prompt prefills is not repeated.
        The end is the one that stops a completion: the chat template's end of turn, or EOS.
        """
        solution = problem.solution or ""
        if "<think>" not in solution:
            solution = f"<think>{solution}</think> <answer>{problem.answer}</answer>"
        if self.prefill(problem):
            solution = solution.lstrip().removeprefix("<think>").lstrip()
        end = self._turn_end or self._tokenizer.eos_token_id
        ids = self._tokenizer(solution, add_special_tokens=False)["input_ids"]
        return (*ids, *([] if end is None else [end]))

    def saved_template(self) -> str:
        """Returns the chat template that a trained model is saved with.

        A server that uses it prompts as the training did.

        The tokenizer's own; without one, the template in use, around the last message. The
        `<think>` prefill is added if there is one.
        """
        own: str | None = self._tokenizer.chat_template
        if own is None:
            bos = (
                "{{ bos_token }}"
                if self.ids(EXAMPLE)[0] == self._tokenizer.bos_token_id is not None
                else ""
            )
            text = self.text(EXAMPLE).replace(EXAMPLE.question, "{{ messages[-1]['content'] }}")
            return bos + text.removesuffix("\n") + ("{{ '\\n' }}" if text.endswith("\n") else "")
        shown = self._tokenizer.apply_chat_template(
            self.messages(EXAMPLE), tokenize=False, add_generation_prompt=True
        )
        if (
            self._settings.template != "chat"
            or not self._settings.think_prefill
            or shown.rstrip().endswith("<think>")
        ):
            return own
        return own + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"

    def fitting(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Returns the problems whose prompts fit `prompt.max_tokens`.

        Raises UserError if some do not, or drops them if so configured.
        """
        limit = self._settings.max_tokens
        overhead = len(self.text(Problem(id="", question="", answer="", source="")).encode())
        # A token has at least one byte, so only prompts of more bytes than the limit need to be
        # tokenised.
        long = {
            i: length
            for i, problem in enumerate(problems)
            if len(problem.question.encode()) + overhead > limit
            and (length := len(self.ids(problem))) > limit
        }
        if not long:
            return problems
        if self._settings.overlong == "error":
            worst = max(long, key=lambda i: long[i])
            raise UserError(
                f"{len(long)} of {len(problems)} prompts are longer than "
                f"prompt.max_tokens={limit} ({problems[worst].id} has {long[worst]} "
                f"tokens): raise it to {long[worst]}, or drop them with prompt.overlong=drop"
            )
        return [problem for i, problem in enumerate(problems) if i not in long]

    def _end_of_turn(self) -> int | None:
        """Returns the token that a chat template writes after an assistant's message.

        A base model's EOS is often another one.
        """
        if self._settings.template != "chat":
            return None
        mark = "@@"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        after = self._tokenizer.apply_chat_template(messages, tokenize=False).rpartition(mark)[2]
        ids = self._tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
        return ids[0] if ids and ids[0] in self._tokenizer.all_special_ids else None


class Chat:
    """What a model behind an endpoint is asked: messages.

    Its tokenizer is not known here, so it adds no tokens and refuses no prompt.
    """

    def __init__(self, settings: configs.Prompt) -> None:
        """`settings`: only the system prompt and the stop strings are used."""
        self.stop, self.stop_token_ids = tuple(settings.stop), tuple[int, ...]()
        self._system = settings.system

    def for_rewards(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the messages, the form in which TRL's reward functions expect a chat prompt."""
        return self.messages(problem)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the system prompt, if any, and the question as messages."""
        user = {"role": "user", "content": problem.question}
        return (
            [{"role": "system", "content": SYSTEM.get(self._system, self._system)}, user]
            if self._system
            else [user]
        )

    def fitting(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Returns all problems, because their lengths in tokens are not known."""
        return problems


def visible(text: str, tokenizer: Any) -> str:
    """Returns a rendered prompt with its special tokens and line ends marked.

    Special tokens are in ⟦ ⟧. `--dry-run` shows this text.
    """
    for token in sorted(set(tokenizer.all_special_tokens), key=len, reverse=True):
        text = text.replace(token, f"⟦{token}⟧")
    return text.replace("\n", "⏎\n")
