"""The models that a stage starts from: the policy with its tokenizer and prompts, the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.common.mixture import Mixture
from grpo.config import RunConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.run import fingerprints, ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import quiet

COMPARED_PROBLEMS = 1000


def find_model(config: RunConfig, run: RunDirectory) -> tuple[Path, Any, Prompts]:
    """Returns the model's directory, its tokenizer and the run's prompts. Raises UserError."""
    with quiet(run.log_file("learner")):
        model_dir = ranks.rank0_first(
            "the model", lambda: models.locate(config.model, run.path, config.seed)
        )
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
        return model_dir, tokenizer, prompts


def require_same_start(tokenizer: Any, stream: Mixture) -> None:
    """Raises UserError on all ranks if their tokenizers or their first problems differ.

    `stream`: the problems in the order in which the run draws them. A set with another number of
    problems is drawn in another order, so it shows in the first ones.
    """
    if ranks.world_size() > 1:
        ranks.require_equal(
            {
                "tokenizer": fingerprints.of_tokenizer(tokenizer),
                "data": fingerprints.of_problems(stream.take(0, COMPARED_PROBLEMS)),
            }
        )


def find_teacher(config: RunConfig, run: RunDirectory, tokenizer: Any, num_tokens: int) -> Path:
    """Returns the directory of `model.teacher`.

    Raises UserError unless the teacher has the student's vocabulary and a context of `num_tokens`.
    """
    assert config.model.teacher
    teacher_dir = models.resolve(config.model.teacher, None, run.path / "teacher", config.seed)
    models.check_same_vocabulary(tokenizer, models.load_tokenizer(teacher_dir))
    models.check_context(teacher_dir, num_tokens)
    return teacher_dir
