"""The `Stage` protocol: what a kind of stage answers about its config, and the values it returns.

Each kind implements it at the end of its own file, and registry.py lists the kinds by command. The
command line, the doctor and the dry run know the kinds by this protocol only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from grpo.config import Data, RunConfig, Section, Teacher
from grpo.experience.prompts import Prompts
from grpo.types import Problem

C = TypeVar("C", bound=Section)

OVERLAP_WORDS = 10  # words in a row that count as an overlap (R1: 10)
OVERLAP_REMEDY = "judge on another set, or leave those out: such accuracy is partly memory"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of the doctor: `Check("warn", "versions", "torch 2.7", "install 2.8")`."""

    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Returns the finding in columns, and its remedy on a line of its own."""
        indent = " " * 21
        text = self.text.replace("\n", f"\n{indent}")
        line = f"{self.level:5} {self.name:14} {text}"
        if not self.remedy:
            return line
        return f"{line}\n{indent}-> {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemNeeds:
    """The problems of a stage.

    `ProblemNeeds(training=data, num_training=768, held_out=(data,), num_held_out=200)`.
    """

    training: Data | None = None  # drawn from the training split
    num_training: int = 0  # drawn in the whole run
    held_out: tuple[Data, ...] = ()  # evaluated on the test split
    num_held_out: int = 0  # per held-out set
    excluded: Data | None = None  # its test split must not be among the traces
    overlap_words: int = OVERLAP_WORDS
    overlap_remedy: str = OVERLAP_REMEDY


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What a stage holds in memory at the same time."""

    learner: bool = False  # weights, gradients, optimizer states, activations
    reference: bool = True  # the learner holds the reference or the teacher, if there is one
    engine: bool = False
    max_sequences: int = 0  # sampled by the stage itself at once; 0: it samples none

    @property
    def syncs_weights(self) -> bool:
        """Whether the learner's weights go to the engine: GRPO's circle."""
        return self.learner and self.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeeds:
    """What a stage writes at most."""

    checkpoints: int = 0
    models: int = 0
    sampled_tokens: int = 0


def num_checkpoints(config: RunConfig) -> int:
    """Returns how many checkpoints lie on disk at once: the kept ones and one being written."""
    settings = config.checkpoint
    return settings.keep_last + 1 + bool(settings.keep_best)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeeds:
    """What a stage needs of data, model, memory and disk."""

    # As the run resolves it: the model of a finished run, the settings of an evaluation protocol.
    config: Any
    max_sequence_tokens: int
    problems: ProblemNeeds
    memory: MemoryNeeds = MemoryNeeds()
    disk: DiskNeeds = DiskNeeds()
    rewards: tuple[str, ...] = ()  # names
    endpoint: Teacher | None = None  # samples in place of an engine
    shows_solution: bool = False  # the dry run shows the prompt with its worked solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the stages that a stage is made of. `name` is "" for a stage without parts."""

    stage: Stage[Any]
    config: RunConfig
    name: str = ""
    traces_to_come: bool = False  # it learns from traces that an earlier part will write


class Stage(Protocol[C]):
    """One kind of stage."""

    @property
    def command(self) -> str:
        """The command of the CLI: `sft`."""

    @property
    def config_class(self) -> type[C]:
        """The class of its configs."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Config keys by which its configs are recognised."""

    def run(self, config: C, *, resume: bool) -> None:
        """Runs the stage to its end. Raises UserError, RunError, Interrupted."""

    def arithmetic(self, config: C) -> str:
        """Returns the batch arithmetic in plain words. A chain returns its commands."""

    def needs(self, config: C) -> StageNeeds | None:
        """Returns what the stage needs, None for a chain of stages with needs of their own."""

    def parts(self, config: C) -> list[Part]:
        """Returns the stages that the doctor inspects: the parts, or the stage itself.

        Raises UserError for a chain.
        """

    def preview(self, config: C) -> list[str]:
        """Loads the plug-ins as the run would; returns further lines for the dry run.

        Raises UserError for a plug-in that is missing or wrong.
        """

    def checks(self, config: C, problems: Sequence[Problem], prompts: Prompts) -> Iterator[Check]:
        """Yields the findings that only this kind has, on the problems that the run draws.

        The doctor does not ask a stage that samples from an endpoint, whose prompts are not known,
        nor one whose traces are still to come.
        """
