"""Aligns the tokens of two tokenizers, for a teacher whose vocabulary differs from the student's.

Student and teacher read the same text. A span is the shortest piece of it that begins and ends at a
token boundary of both:

    student   | 12 | 34 | + |
    teacher   | 1 | 234 | + |
    spans     | 1234    | + |

At the start of a span both models have read the same text, so their predictions of the text that
follows can be compared (`divergence.span_divergence`). Tokens are compared by their bytes. No
torch.

Source: GOLD (Hugging Face, 2025) and its code in TRL (spans by bytes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo.types import TeacherText, UserError


class Tokens(NamedTuple):
    """A tokenizer, with what an alignment needs to know about it."""

    tokenizer: Any
    end_id: int | None  # the token with which the model ends a completion
    stop_ids: Collection[int]  # all tokens that end a completion
    bytes_of: list[bytes]  # the text of each token; b"" for an id without a token


class TokenPair(NamedTuple):
    """The ids of one token in two vocabularies."""

    student: int
    teacher: int


def read_tokens(tokenizer: Any, end_id: int | None, stop_ids: Collection[int] = ()) -> Tokens:
    """Returns a tokenizer with the bytes of all its tokens.

    Args:
        tokenizer: The tokenizer.
        end_id: The token with which the model ends a completion.
        stop_ids: Other tokens that end a completion.

    Raises:
        UserError: The tokens do not state their bytes: it is neither a byte-level BPE (Qwen, Llama
            3, GPT-2) nor a SentencePiece model with byte fallback (Llama 2, Gemma).
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {decoder.get("type"), *(step["type"] for step in decoder.get("decoders", []))}
    to_bytes: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        to_bytes = _ByteLevel()
    elif "ByteFallback" in kinds:
        to_bytes = _sentencepiece_bytes
    else:
        raise UserError(
            "the tokens of this tokenizer do not state their bytes, so they cannot be aligned with "
            f"those of another one (decoder {', '.join(sorted(map(str, kinds)))}): use grpo "
            "distill with way=sequence"
        )
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    bytes_of = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        content = added.get(token_id)
        bytes_of[token_id] = to_bytes(token) if content is None else content.encode()
    all_stop_ids = {*stop_ids} if end_id is None else {*stop_ids, end_id}
    return Tokens(tokenizer, end_id, all_stop_ids, bytes_of)


class _ByteLevel:
    """Returns the bytes of a token of a byte-level BPE, in which each byte is one character."""

    def __init__(self) -> None:
        # GPT-2's code: printable characters stand for themselves, all other bytes for the
        # characters from 256 on, in order.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def __call__(self, token: str) -> bytes:
        return bytes(self._bytes[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    """Returns the bytes of a SentencePiece token: `▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The tokens of a student and of a teacher with another tokenizer.

    Attributes:
        student: The student's tokens.
        teacher: The teacher's tokens.
        max_teacher_tokens: The context of the teacher. None: unknown.
    """

    student: Tokens
    teacher: Tokens
    max_teacher_tokens: int | None = None

    def common_tokens(self) -> list[TokenPair]:
        """Returns the tokens with the same bytes, and those that end a completion.

        Of several tokens with the same bytes, the one with the lowest id counts.
        """
        teacher_ids: dict[bytes, int] = {}
        for token_id, content in enumerate(self.teacher.bytes_of):
            if content and token_id != self.teacher.end_id:
                teacher_ids.setdefault(content, token_id)
        pairs = []
        for token_id, content in enumerate(self.student.bytes_of):
            if token_id != self.student.end_id and content in teacher_ids:
                pairs.append(TokenPair(token_id, teacher_ids.pop(content)))
        if self.student.end_id is not None and self.teacher.end_id is not None:
            pairs.append(TokenPair(self.student.end_id, self.teacher.end_id))
        return pairs

    def teacher_text(
        self, prompt_ids: tuple[int, ...], completion_ids: Sequence[int]
    ) -> TeacherText:
        """Returns a completion in the teacher's tokens, and the spans.

        The spans end where the two texts begin to differ: at bytes that are not valid UTF-8 (a
        completion that was cut off within a character), or where a tokenizer normalizes the text.
        They also end at the end of the teacher's context. Without any span, the teacher's
        completion is one token that is not compared.

        Args:
            prompt_ids: The teacher's prompt.
            completion_ids: The completion in the student's tokens, possibly with a token that ends
                it. That token corresponds to the teacher's `end_id`.
        """
        is_ended = bool(completion_ids) and completion_ids[-1] in self.student.stop_ids
        student_ids = completion_ids[:-1] if is_ended else completion_ids
        contents = [self.student.bytes_of[token_id] for token_id in student_ids]
        text = _valid_text(b"".join(contents))
        teacher_ids = self.teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
        teacher_contents = [self.teacher.bytes_of[token_id] for token_id in teacher_ids]
        spans = _spans(contents, _without_added_space(teacher_contents, text))
        covers_all = not student_ids or spans[-1:] == [(len(student_ids), len(teacher_ids))]
        if is_ended and covers_all and self.teacher.end_id is not None:
            teacher_ids = [*teacher_ids, self.teacher.end_id]
            spans.append((len(completion_ids), len(teacher_ids)))
        if self.max_teacher_tokens is not None:
            num_left = self.max_teacher_tokens - len(prompt_ids)
            spans = [span for span in spans if span[1] <= num_left]
        num_compared = spans[-1][1] if spans else 0
        return TeacherText(
            prompt_ids=prompt_ids,
            completion_ids=tuple(teacher_ids[:num_compared]) or (0,),
            spans=tuple(spans),
        )


def _without_added_space(contents: list[bytes], text: str) -> list[bytes]:
    """Returns the tokens of a text without a space that the tokenizer puts before it (Llama 2)."""
    if b"".join(contents) != b" " + text.encode():
        return contents
    return [contents[0].removeprefix(b" "), *contents[1:]]


def _valid_text(content: bytes) -> str:
    """Returns the text up to the first byte that is not valid UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return content[: error.start].decode()


def _spans(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Returns the ends of the spans, in tokens: `[(2, 2), (3, 3)]` for the example above."""
    student_text, teacher_text = b"".join(student), b"".join(teacher)
    num_equal = _num_equal_bytes(student_text, teacher_text)
    # A token without bytes belongs to the span before it.
    teacher_ends = _ends(teacher)
    spans = []
    for position, num_tokens in _ends(student).items():
        if position <= num_equal and position in teacher_ends:
            spans.append((num_tokens, teacher_ends[position]))
    return spans


def _ends(contents: Sequence[bytes]) -> dict[int, int]:
    """Returns the number of tokens up to each position, in bytes, at which a token ends."""
    ends = {}
    position = 0
    for num_tokens, content in enumerate(contents, start=1):
        position += len(content)
        ends[position] = num_tokens
    ends.pop(0, None)
    return ends


def _num_equal_bytes(first: bytes, second: bytes) -> int:
    """Returns the length of the common start of two texts."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
