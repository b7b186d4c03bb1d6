"""All kinds of stages. A new kind is a file in this folder and a line in `_ALL`."""

from __future__ import annotations

from typing import Any

from grpo.stages import collect, distill, eval, pipeline, quantize, sft, train
from grpo.stages.stage import Stage

# In the order of the command line's help.
_ALL: tuple[Stage[Any], ...] = (
    sft.STAGE,
    train.STAGE,
    collect.STAGE,
    distill.STAGE,
    quantize.STAGE,
    eval.STAGE,
    pipeline.STAGE,
)
STAGES = {stage.command: stage for stage in _ALL}


def stage_of(tree: dict[str, Any]) -> Stage[Any]:
    """Returns the stage that a config's sections belong to; `train` if they belong to no other.

    A config of pipeline or distill may have sections of other kinds too, so these two come first.
    """
    by_precedence: tuple[Stage[Any], ...] = (pipeline.STAGE, distill.STAGE, *_ALL)
    for stage in by_precedence:
        if any(key in tree for key in stage.sections):
            return stage
    return STAGES["train"]
