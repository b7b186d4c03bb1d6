"""The values that flow through the program, and the base classes of its errors.

The values form two chains:

    experience   Problem -> Group (of Completions) -> ScoredGroup
    learning     ScoredGroup -> Sample -> Batch

All values are frozen: a step of the program reads its input and returns a new value.

A checkpoint stores scored groups as JSON, with their problems and completions. The field names of
these classes are its keys, so a renamed field breaks the resume of earlier runs.

Shapes and the suffixes of names (`rewards_PG`) use these letters:

    P   problems
    G   completions per group
    B   sequences of a micro-batch
    T   positions of a padded sequence
    L   tokens of one sequence; differs between sequences

At run time this module imports the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class GrpoError(Exception):
    """Base class of the errors that grpo raises. Instances can be pickled and sent between ranks.

    Attributes:
        raised_on_all_ranks: True if all ranks raise the error at the same point. They can then
            still run collectives, for example to write a checkpoint.
        failed_rank: the rank on which the error occurred; None if the ranks have not exchanged it.
    """

    raised_on_all_ranks: bool = False
    failed_rank: int | None = None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, "" if it has none.

    Libraries append stack traces and long explanations to their messages.
    """
    return str(error).partition("\n")[0]


class UserError(GrpoError, ValueError):
    """An error in the config, the data or a path, which the user can fix.

    The CLI prints the message in one line and exits with code 2.
    """


class DownloadError(UserError):
    """A model or a data set is not on this machine and cannot be downloaded.

    `--dry-run` prints the message and continues without the model or the data set.
    """


class RunError(GrpoError, RuntimeError):
    """An error that ends a run, such as a lost engine, a failed probe or a full disk.

    The CLI prints the message in one line and exits with code 1.
    """


class TrainingStoppedError(RunError):
    """Training stops: no training signal is left, too many completions are undecided, or an alarm.

    The state after the last complete rollout is valid and is saved.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem with a checkable answer.

    Example:
        A problem of the Countdown game::

            Problem(
                id="countdown/train/7",
                question="Use 3, 5 and 7 once each to make 22.",
                answer="3 * 5 + 7",
                source="countdown",
                meta={"numbers": [3, 5, 7], "target": 22},
            )

    Attributes:
        id: unique within the data of a run. Seeds and samples are keyed by it.
        question: the text of the problem, which becomes part of the prompt.
        answer: the correct answer, which a reward compares with the completion.
        source: the name of the data set.
        solution: a worked solution, the target text of supervised training; None without one.
        meta: other fields of the data set, which rewards and filters read by name.
        data_set: the data set's name in the config, `data.name` or the name in `data.mixture`.
    """

    id: str
    question: str
    answer: str
    source: str
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    data_set: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion of L tokens.

    An OpenAI-compatible endpoint reports neither token ids nor logprobs. Its completions have
    `token_ids` of L zeros and empty `logprobs`.

    Example:
        Three tokens, of which weight version 4 sampled two and version 5 sampled one::

            Completion(
                token_ids=(52, 9, 1),
                logprobs=(-0.1, -2.3, -0.7),
                text="<think>...",
                finish_reason="stop",
                versions=((4, 0, 2), (5, 2, 3)),
            )

    Attributes:
        token_ids: `[L]`, the sampled tokens, including the EOS token if one was sampled.
        logprobs: `[L]`, the natural logarithm of the probability with which the engine sampled
            each token, after temperature.
        text: the text that rewards score: the decoded tokens without the EOS token. If the prompt
            ends in a prefilled `<think>`, the text begins with it.
        finish_reason: "stop" after a stop token or a stop string, "length" at the token limit.
        versions: spans `(weight version, start, end)`: the weights of that version sampled
            `token_ids[start:end]`. The spans cover all tokens. There is one span unless the engine
            received new weights during the completion.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    versions: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The completions of one prompt.

    Attributes:
        problem: the problem in the prompt.
        prompt_ids: `[prompt length]`, the tokens of the prompt.
        completions: `[G]`, in the order of their seeds.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]


# Undecided completions are counted by these causes. The reason of an undecided verdict contains the
# cause, otherwise it counts as "other".
UNDECIDED_CAUSES = ("no grade", "worker lost", "reward failed", "gold answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of verifying a completion's final answer.

    Example:
        `Verdict(value="wrong", reason="no final answer")`

    Attributes:
        value: "correct" or "wrong". "undecided" if the verification itself failed, for example
            because the problem's answer cannot be parsed; the completion then gets no reward.
        reason: a short explanation, empty if there is none. For an undecided completion, it
            contains the cause: "no grade", "worker lost", "reward failed" or "gold answer".
    """

    value: Literal["correct", "wrong", "undecided"]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The value of a reward function, and the reason if the value is low.

    Example:
        `Score(value=0.0, reason="no answer")`

    Attributes:
        value: the reward, before its weight.
        reason: why the value is low, empty if it is not. Each distinct reason becomes a metric
            (`format/no_answer`), so a reward function must use a small fixed set of reasons.
    """

    value: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards.

    Example:
        Two completions, of which the first is correct and the second has no answer::

            ScoredGroup(
                group=group,
                rewards=(1.1, 0.0),
                parts=({"accuracy": 1.0, "format": 1.0}, {"accuracy": 0.0, "format": 0.0}),
                verdicts=(
                    Verdict(value="correct"),
                    Verdict(value="wrong", reason="no final answer"),
                ),
                faults=({}, {"format": "no answer"}),
            )

    Attributes:
        group: the prompt and its completions.
        rewards: `[G]`, the weighted sum of `parts`. None if a verdict is undecided or no reward
            applies: the completion is excluded from the group's baseline and from the update.
        parts: `[G]`, the value of each reward by name, before its weight. None if the reward does
            not apply to the completion, or returned an undecided verdict.
        verdicts: `[G]`, the first undecided verdict that a reward function returned, or else the
            first verdict; None without one.
        faults: `[G]`, the reasons for low scores, by reward name.
    """

    group: Group
    rewards: tuple[float | None, ...]
    parts: tuple[dict[str, float | None], ...]
    verdicts: tuple[Verdict | None, ...]
    faults: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherText:
    """What a teacher reads in place of a sample's prompt and completion.

    Example:
        A completion of three tokens, which are four tokens of the teacher. Both tokenizers have a
        boundary after the student's second and the teacher's third token, and at the end::

            TeacherText(prompt_ids=(3,), completion_ids=(4, 7, 2, 1), spans=((2, 3), (3, 4)))

    Attributes:
        prompt_ids: the tokens of the teacher's prompt.
        completion_ids: the completion in the teacher's tokens; None if they are the sample's.
        spans: the ends of the spans (grpo/learning/alignment.py), as numbers of the student's and
            of the teacher's completion tokens. None if the tokens are the sample's.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training sequence of L tokens: a prompt and its completion.

    Example:
        A prompt of two tokens and a completion of three::

            Sample(
                token_ids=(5, 6, 7, 8, 1),
                prompt_length=2,
                advantages=(0.7, 0.7, 0.7),
                sampler_logprobs=(-0.1, -2.3, -0.7),
                versions=(4, 4, 4),
                group=0,
                reward=1.0,
            )

    Attributes:
        token_ids: `[L]`, the prompt's tokens, then the completion's.
        prompt_length: the number of prompt tokens, which carry no loss.
        advantages: `[completion length]`, one per completion token.
        sampler_logprobs: `[completion length]`, the engine's `Completion.logprobs`; None if no
            engine sampled the tokens (supervised training).
        versions: `[completion length]`, the version of the weights that sampled each token; None
            if no engine sampled the tokens.
        group: the index of the sample's group within the update.
        reward: the completion's reward; 0 in supervised training.
        teacher_text: what a teacher reads, if it differs from the sample's tokens: another prompt
            (`algorithm.teacher_hint`), or the tokens of another tokenizer.
        teacher: the name of the teacher in `model.teachers`; "" for `model.teacher`.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    advantages: tuple[float, ...]
    sampler_logprobs: tuple[float, ...] | None = None
    versions: tuple[int, ...] | None = None
    group: int = 0
    reward: float = 0.0
    teacher_text: TeacherText | None = None
    teacher: str = ""

    @property
    def completion_length(self) -> int:
        """The number of completion tokens."""
        return len(self.token_ids) - self.prompt_length


class SpanIndex(NamedTuple):
    """The K spans of a micro-batch: pieces of text between boundaries of both tokenizers.

    The batch has N completion tokens of the student and M of the teacher, row by row.

    Attributes:
        student_starts: `[K]`, the index of each span's first token among the N.
        teacher_starts: `[K]`, the same among the M.
        student_spans: `[N]`, the index of the span that each token continues; -1 for the first
            token of a span, and for tokens without one.
        teacher_spans: `[M]`, the same for the teacher's tokens.
    """

    student_starts: Tensor
    teacher_starts: Tensor
    student_spans: Tensor
    teacher_spans: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of B sequences, padded on the right to T positions.

    Position t predicts the token `labels[:, t]`: the labels are the input shifted left by one
    position. The tensors from `token_mask` on are aligned with the labels: position t holds the
    values of the token that it predicts.

    Example:
        The prompt (5, 6) and the completion (7, 8), padded with 0 to T = 5::

            input_ids         5  6  7  8  0
            attention_mask    1  1  1  1  0
            labels            6  7  8  0  0
            token_mask        F  T  T  F  F
            token_weights     0  w  w  0  0

    Attributes:
        sample_indices: `[B]`, the index of each row's sample in the list that was split into
            micro-batches.
        sequences: `[B]`, the tokens of each row without padding.
        prompt_lengths: `[B]`, the number of prompt tokens of each row.
        input_ids: `[B, T]`, int64.
        attention_mask: `[B, T]`, int64: 1 on tokens, 0 on padding.
        labels: `[B, T]`, int64.
        token_mask: `[B, T]`, bool: True where the predicted token belongs to the completion.
        token_weights: `[B, T]`, float32: the reduction of the loss, which is the sum of
            `token_weights * per_token_loss`. 0 on the prompt and on padding.
        advantages: `[B, T]`, float32.
        sampler_logprobs: `[B, T]`, float32, of the engine; 0 if no engine sampled the token.
        versions: `[B, T]`, int64: the version of the weights that sampled the token; -1 if no
            engine sampled the token.
        teacher_top: `(token ids, logprobs)` of the teacher's k most likely tokens, each `[N, k]`
            for the N completion tokens of the batch, row by row. None without a teacher, or if
            the learner runs the teacher itself.
        is_filler: True for a filler whose token weights are 0. A rank without further samples
            needs it to take part in the collectives of the other ranks.
        max_rank_tokens: the largest number of completion tokens on any rank for this micro-batch.
            All ranks run the output head in the same number of chunks, because ZeRO-3 gathers its
            weights for each chunk.
        old_logprobs: `[B, T]`, the denominator of the policy ratio: logprobs of the policy before
            the rollout's first update, or those of the sampler. None if they equal the policy's
            current logprobs, so that every ratio is 1.
        ref_logprobs: `[B, T]`, of the reference model. None if the loss has no KL term.
        teacher_batch: what the teacher reads, row by row, with another number of positions. None
            if it reads the same tokens.
        spans: where the tokens of student and teacher have common boundaries. None if both have
            the same vocabulary.
        teacher: the name of the teacher of all rows in `model.teachers`; "" for `model.teacher`.
    """

    sample_indices: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_mask: Tensor
    token_weights: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    versions: Tensor
    teacher_top: tuple[Tensor, Tensor] | None = None
    is_filler: bool = False
    max_rank_tokens: int = 1
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_batch: Batch | None = None
    spans: SpanIndex | None = None
    teacher: str = ""
