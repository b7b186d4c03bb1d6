"""Checks before a pipeline starts that the sequences of every stage fit its model's context."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import ModelSettings
from grpo.learning import models
from grpo.stages.registry import find_stage
from grpo.types import DownloadError, UserError

if TYPE_CHECKING:
    from grpo.stages.pipeline import PlannedCommand


def check_contexts(
    commands: Sequence[PlannedCommand], written_models: Mapping[str, Sequence[str]]
) -> list[str]:
    """Checks the lengths of all stages and evaluations of a pipeline.

    Args:
        commands: The commands in order.
        written_models: The directories of the models that a command writes, by its name.

    Returns:
        A line per model of the hub whose context is unknown, because it cannot be downloaded.

    Raises:
        UserError: The sequences of a command are longer than the context of its model, or its model
            does not exist. The message names the command.
    """
    contexts: dict[str, int | None] = {}  # by model path; None: unknown
    unknown: dict[str, str] = {}  # the error by model path
    for command in commands:
        config: Any = command.load_config()
        for part in find_stage(command.command).parts(config):
            settings = part.config.model
            needs = part.stage.needs(part.config)
            if needs is None or needs.endpoint is not None:
                continue  # an endpoint has its own model and checks its own lengths
            if settings.path not in contexts:
                try:
                    contexts[settings.path] = _context(settings.path, settings.revision)
                except DownloadError as error:
                    contexts[settings.path] = None
                    unknown[settings.path] = f"lengths of {command.name}: not checked: {error}"
                except UserError as error:
                    raise UserError(f"stage {command.name}: {error}") from None
            context = _extended(contexts[settings.path], settings)
            _check(command.name, needs, settings.path, context)
            for model in written_models.get(command.name, ()):
                contexts[model] = context
    return list(unknown.values())


def _check(name: str, needs: Any, model: str, context: int | None) -> None:
    if context is not None and needs.max_sequence_tokens > context:
        raise UserError(
            f"stage {name}: sequences of up to {needs.max_sequence_tokens:,} tokens, but the "
            f"context of {model} is {context:,} tokens: lower prompt.max_tokens, "
            "sampling.max_tokens or the max_tokens of the stage, or extend the context with "
            "model.rope (for an evaluation of the start model: start: false)"
        )


def _context(path: str, revision: str | None) -> int | None:
    """Returns the context of a model that no stage writes, in tokens. None if it has no limit."""
    if path in models.TINY_MODELS:
        return int(models.TINY_CONFIG["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = models.resolve(path, revision, Path(scratch), seed=0, weights=False)
        return models.context_tokens(model_dir)


def _extended(context: int | None, settings: ModelSettings) -> int | None:
    """Returns the context after `model.rope` has extended it."""
    rope = settings.rope
    if rope is None or context is None:
        return context
    return int((rope.original_tokens or context) * rope.factor)
