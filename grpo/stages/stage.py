"""The `Stage` protocol and the values that its methods return.

Each kind of stage implements the protocol at the end of its own module, and registry.py lists the
kinds by command. The command line, the doctor and the dry run use a kind only through the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from grpo.config import DataSettings, EndpointSettings, RunConfig, Section
from grpo.experience.prompts import Prompts
from grpo.types import Problem

ConfigT = TypeVar("ConfigT", bound=Section)

OVERLAP_WORDS = 10  # problems that share this many consecutive words overlap (DeepSeek-R1: 10)
OVERLAP_REMEDY = (
    "evaluate on another set, or exclude the overlapping problems: the model may have memorised "
    "their answers"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of the doctor: `Check("warn", "versions", "torch 2.7", "install 2.8")`."""

    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Returns the finding in columns, with the remedy on a separate line."""
        indent = " " * 21
        text = self.text.replace("\n", f"\n{indent}")
        line = f"{self.level:5} {self.name:14} {text}"
        if not self.remedy:
            return line
        return f"{line}\n{indent}-> {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemNeeds:
    """The problems that a stage draws.

    `ProblemNeeds(training=data, num_training=768, held_out=(data,), num_held_out=200)`.
    """

    training: DataSettings | None = None  # drawn from its training split
    num_training: int = 0  # drawn in the complete run
    held_out: tuple[DataSettings, ...] = ()  # evaluated on their test splits
    num_held_out: int = 0  # evaluated per held-out set
    excluded: DataSettings | None = None  # traces must not overlap its test split
    overlap_words: int = OVERLAP_WORDS
    overlap_remedy: str = OVERLAP_REMEDY


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """The parts of a run that are in memory at the same time."""

    learner: bool = False  # weights, gradients, optimizer states, activations
    reference: bool = True  # the learner also holds the reference or the teacher, if there is one
    engine: bool = False
    max_sequences: int = 0  # sampled concurrently by the stage itself; 0: it does not sample

    @property
    def syncs_weights(self) -> bool:
        """Whether the learner sends its weights to the engine, as GRPO does."""
        return self.learner and self.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeeds:
    """Upper bounds for the files of a stage."""

    checkpoints: int = 0  # number on disk at the same time
    models: int = 0  # number of written models
    sampled_tokens: int = 0  # in samples/


def max_checkpoints_on_disk(config: RunConfig) -> int:
    """Returns the largest number of checkpoints that are on disk at the same time."""
    settings = config.checkpoint
    num_kept = settings.keep_last
    if settings.keep_best:
        num_kept += 1
    return num_kept + 1  # a new checkpoint is complete before an old one is removed


def _accept(_config: Any) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeeds:
    """The data, model, memory and disk space that a stage needs."""

    # The config as the run resolves it: `model.path` is the model of a finished run, and an
    # evaluation protocol has replaced the settings that it defines.
    config: Any
    max_sequence_tokens: int
    problems: ProblemNeeds
    memory: MemoryNeeds = MemoryNeeds()
    disk: DiskNeeds = DiskNeeds()
    rewards: tuple[str, ...] = ()  # names
    endpoint: EndpointSettings | None = None  # the stage samples from it instead of an engine
    shows_solution: bool = False  # the dry run shows the prompt with its worked solution
    # Raises UserError if a setting of the config needs a teacher with the student's vocabulary.
    check_other_vocabulary: Callable[[Any], None] = _accept


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage that the doctor inspects: `Part(stage=STAGE, config=config, name="sft")`."""

    stage: Stage[Any]
    config: RunConfig
    name: str = ""  # "" if the stage has a single part
    traces_pending: bool = False  # the part trains on traces that an earlier part will write


class Stage(Protocol[ConfigT]):
    """One kind of stage."""

    @property
    def command(self) -> str:
        """The command of the CLI, for example `sft`."""

    @property
    def config_class(self) -> type[ConfigT]:
        """The class of this kind's configs."""

    @property
    def sections(self) -> tuple[str, ...]:
        """The top-level config keys that identify a config of this kind."""

    def run(self, config: ConfigT, *, resume: bool) -> None:
        """Runs the stage until it is finished.

        Raises:
            UserError: The config, the data or a path is wrong.
            RunError: The run cannot continue.
            RunInterruptedError: The process received SIGINT or SIGTERM.
        """

    def batch_arithmetic(self, config: ConfigT) -> str:
        """Returns the batch arithmetic as text. A pipeline returns its commands."""

    def needs(self, config: ConfigT) -> StageNeeds | None:
        """Returns the needs of the stage, or None for a pipeline, which runs other stages."""

    def parts(self, config: ConfigT) -> list[Part]:
        """Returns the stages that the doctor inspects: the parts of this one, or the stage itself.

        Raises:
            UserError: The stage is a pipeline.
        """

    def dry_run_lines(self, config: ConfigT) -> list[str]:
        """Loads the plug-ins as the run would and returns additional lines for the dry run.

        Raises:
            UserError: A plug-in is missing or wrong.
        """

    def checks(
        self, config: ConfigT, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        """Yields the findings that are specific to this kind.

        The doctor does not call this method for a stage that samples from an endpoint, because its
        prompts are unknown, nor for a stage whose traces do not exist yet.

        Args:
            config: The config of the stage.
            problems: The first problems that the run draws, without repeats.
            prompts: The prompts of the run.
        """
