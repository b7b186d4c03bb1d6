"""Finds the model that a run starts from, with its tokenizer and prompts, and its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grpo.config import PromptSettings, RunConfig
from grpo.data.common.mixture import Mixture
from grpo.experience.hints import OtherVocabulary
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.alignment import Alignment, TokenPair, read_tokens
from grpo.run import fingerprints, ranks
from grpo.run.directory import RunDirectory, write_file
from grpo.run.display import redirect_output
from grpo.stages.run_context import RunContext
from grpo.types import UserError

COMPARED_PROBLEMS = 1000  # number of the run's first problems that the ranks compare


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModel:
    """The model that a run starts from, on disk: no weights are loaded."""

    model_dir: Path
    tokenizer: Any
    prompts: Prompts


def find_start_model(config: RunConfig, context: RunContext) -> StartModel:
    """Returns the model of `config.model`, downloaded or created if necessary.

    Raises:
        UserError: The model does not exist, or the prompts do not fit its tokenizer.
    """
    run = context.run

    def locate() -> Path:
        return models.locate(
            config.model, run.path, config.seed, on_progress=context.display.download
        )

    with redirect_output(run.log_file("learner")):
        model_dir = ranks.rank0_first("the model", locate)
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
        if config.prompt.chat_template is not None:
            ranks.rank0_first(
                "the chat template", lambda: _record_chat_template(run, tokenizer.chat_template)
            )
        return StartModel(model_dir=model_dir, tokenizer=tokenizer, prompts=prompts)


def _record_chat_template(run: RunDirectory, template: str) -> None:
    """Writes chat_template.jinja into a new run. Raises UserError if a resumed run has another."""
    if ranks.rank() != 0:
        return
    recorded = run.path / "chat_template.jinja"
    if not recorded.exists():
        write_file(recorded, template)
    elif recorded.read_text(encoding="utf-8") != template:
        raise UserError(
            f"prompt.chat_template: the file has changed since the run started with {recorded}: "
            "restore it, or choose another run_dir"
        )


def require_same_start(tokenizer: Any, mixture: Mixture) -> None:
    """Raises UserError on all ranks if their tokenizers or their first problems differ.

    Args:
        tokenizer: The tokenizer of this rank.
        mixture: The problems in the order in which the run draws them. The order depends on the
            size of every data set, so a difference in size is visible in the first problems.
    """
    if ranks.world_size() == 1:
        return
    ranks.require_equal(
        {
            "tokenizer": fingerprints.fingerprint_tokenizer(tokenizer),
            "data": fingerprints.fingerprint_problems(mixture.take(0, COMPARED_PROBLEMS)),
        }
    )


def find_teachers(
    config: RunConfig, context: RunContext, max_sequence_tokens: int
) -> dict[str, Path]:
    """Returns the directories of all teachers by name; that of `model.teacher` is "".

    Args:
        config: The config of the run.
        context: The context of the run. Tiny teachers are created in its directory.
        max_sequence_tokens: Longest sequence that the teachers must process.

    Raises:
        UserError: A teacher does not exist, or its context is too short.
    """
    teacher_dirs = models.resolve_teachers(
        config.model, context.run.path, config.seed, on_progress=context.display.download
    )
    for teacher_dir in teacher_dirs.values():
        models.check_context(teacher_dir, max_sequence_tokens, config.length_keys)
    return teacher_dirs


class Teachers(NamedTuple):
    """The teachers of a run by name; that of `model.teacher` has the name ""."""

    model_dirs: Mapping[str, Path]
    vocabularies: Mapping[str, OtherVocabulary]  # of those whose vocabulary is not the student's

    def common_tokens(self) -> dict[str, list[TokenPair]]:
        """Returns the tokens that the student and each of `vocabularies` have in common."""
        return {name: each.alignment.common_tokens() for name, each in self.vocabularies.items()}


def find_other_vocabularies(
    settings: PromptSettings,
    tokenizer: Any,
    prompts: Prompts,
    teacher_dirs: Mapping[str, Path],
) -> dict[str, OtherVocabulary]:
    """Returns the prompts and tokens of each teacher whose vocabulary is not the student's.

    Args:
        settings: The config section `prompt`.
        tokenizer: The tokenizer of the student.
        prompts: The prompts of the student.
        teacher_dirs: The directories of the teachers by name.

    Raises:
        UserError: The tokens of a teacher cannot be aligned with the student's, or the prompts do
            not fit its tokenizer.
    """
    vocabularies = {}
    # `prompt.chat_template` is for the student. A teacher has its own.
    teacher_settings = settings.model_copy(update={"chat_template": None})
    for name, teacher_dir in teacher_dirs.items():
        teacher_tokenizer = models.load_tokenizer(teacher_dir)
        if models.has_same_vocabulary(tokenizer, teacher_tokenizer):
            continue
        teacher_prompts = Prompts(
            teacher_settings, teacher_tokenizer, models.eos_token_ids(teacher_dir)
        )
        alignment = Alignment(
            student=read_tokens(tokenizer, prompts.end_id, prompts.stop_token_ids),
            teacher=read_tokens(teacher_tokenizer, teacher_prompts.end_id),
            max_teacher_tokens=models.context_tokens(teacher_dir),
        )
        vocabularies[name] = OtherVocabulary(teacher_prompts, alignment)
    return vocabularies


def require_for_other_vocabulary(is_met: Mapping[str, bool]) -> None:
    """Raises UserError if a setting needs a teacher with the student's vocabulary.

    `is_met` has what must be set otherwise, such as `"soft.temperature=1"`, and whether it is.
    """
    missing = [setting for setting, is_set in is_met.items() if not is_set]
    if missing:
        raise UserError(
            f"student and teacher have different vocabularies, which needs {', '.join(missing)}"
        )
