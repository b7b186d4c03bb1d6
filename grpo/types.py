"""The values that flow through the program. Standard library only.

Experience:  Problem -> Group of Completions -> ScoredGroup        Learning:  Sample -> Batch
Every value is frozen: a step never changes what it was given, it returns the next type.
Axes in names and comments: P problems, G group, B sequences, T positions, L ragged length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


class GrpoError(Exception):
    """An error of ours, which ranks can send to each other.

    `known_to_all_ranks`: every rank raises it, so all can still do something together, such as
    write a checkpoint. `failed_rank`: the rank that it began on; None if it was not sent.
    """

    known_to_all_ranks: bool = False
    failed_rank: int | None = None


class UserError(GrpoError, ValueError):
    """A mistake the user can mend (config, data, paths).

    The CLI prints it in one line and exits with 2.
    """


class Unreachable(UserError):
    """A model or a data set that is not here and cannot be fetched.

    `--dry-run` goes on without it.
    """


class RunError(GrpoError, RuntimeError):
    """A run that cannot go on (lost engine, failed probe, full disk).

    The CLI prints it in one line and exits with 1.
    """


class Exhausted(RunError):
    """A run that has nothing left to learn from.

    The state after its last whole rollout is good and is saved.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem with a checkable answer.

    `Problem(id="gsm8k/train/7", question="2+2?", answer="4", source="gsm8k")`.
    """

    id: str
    question: str
    answer: str
    source: str
    solution: str | None = None  # worked solution, for SFT
    # e.g. countdown: {"numbers": [3, 5, 7], "target": 22}
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion of L tokens.

    `token_ids=(52, 9, 1), logprobs=(-0.1, -2.3, 0.0), text="<think>..."`.

    `token_ids` include the EOS token when one was sampled. `logprobs` are the sampler's, after
    temperature.
    `text` is what rewards judge: the sampled text without its EOS token, with a `<think>` that the
    prompt prefilled put back in front.
    `versions` are spans `(weight version, start, end)`; one span when on-policy.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    versions: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G completions of one prompt."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judgement of one completion.

    `undecided` means a failure of ours (a gold answer we cannot read), never the completion's.
    """

    value: Literal["correct", "wrong", "undecided"]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A reward and, in a few fixed words, what kept it low: `Score(value=0.0, reason="no answer")`.

    Each reason becomes a metric.
    """

    value: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards [G].

    `None` marks a completion without a reward, which is left out of the baseline and the update.

    `parts` [G] hold each reward function's value, before weights: `{"accuracy": 1.0, "format":
    0.0}`; `faults` [G] the reasons of its scores: `{"format": "no answer"}`.
    """

    group: Group
    rewards: tuple[float | None, ...]
    parts: tuple[dict[str, float | None], ...]
    verdicts: tuple[Verdict | None, ...]
    faults: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trainable sequence [L]: prompt then completion. `prompt_length` tokens carry no loss.

    `advantages` [completion length]; `sampler_logprobs` and `versions` (of the weights that sampled
    a token) [completion length] or None when there was no sampler. `group`: which of the update's
    groups it belongs to.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    advantages: tuple[float, ...]
    sampler_logprobs: tuple[float, ...] | None = None
    versions: tuple[int, ...] | None = None
    group: int = 0
    reward: float = 0.0

    @property
    def completion_length(self) -> int:
        """Tokens of the completion: all that follow the prompt."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One padded micro-batch [B, T]; position t predicts `labels[:, t]`, shifted left once, here.

    With prompt (5, 6), completion (7, 8) and padding 0 to T = 5:
        input_ids      5  6  7  8  0
        labels         6  7  8  0  0
        token_weights  0  w  w  0  0
    The reduction is in the weights: 0 on prompt, padding and dropped completions. `index` [B] tells
    which of the update's samples each row is; `sequences` [B] are its tokens without padding.
    """

    index: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_mask: Tensor  # bool: positions that predict a completion token
    token_weights: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    versions: Tensor  # of the weights that sampled a token; -1 where nothing did
    # token ids and logprobs [N, k] of the teacher, for the N completion tokens in order
    teacher_top: tuple[Tensor, Tensor] | None = None
    # a rank that has nothing to do in an exchange does this one's work, of weight 0
    idle: bool = False
    # the most completion tokens that a rank has at this time: all run the head as often (ZeRO-3
    # makes it whole each time)
    most: int = 1
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
