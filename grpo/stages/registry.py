"""All kinds of stages. A new kind is a file here with a `STAGE`, and a line in `SUMMARIES`.

A kind's file is imported only when it is asked for, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.stages.stage import Stage

# By command, which is also the name of the file: one line of help, in the order of the help.
SUMMARIES = {
    "sft": "fine-tune on worked solutions",
    "train": "train by GRPO",
    "collect": "sample completions and keep the right, readable ones as traces",
    "distill": "a teacher's reasoning into a student: by text, by its distribution, or on-policy",
    "quantize": "write a finished model in int8 and int4, and judge it before and after",
    "eval": "judge a model by a config's prompts and rewards; or compare two: `grpo eval RUN "
    "RUN`; or ask it: --ask",
    "pipeline": "run a chain of stages and judge the model of each",
}
# A config of these may have sections of other kinds too.
COMPOSED = ("pipeline", "distill")


def find_stage(command: str) -> Stage[Any]:
    """Returns the kind of stage that a command runs."""
    stage: Stage[Any] = importlib.import_module(f"grpo.stages.{command}").STAGE
    return stage


def stage_of(tree: dict[str, Any]) -> Stage[Any]:
    """Returns the stage that a config's sections belong to; `train` if they belong to no other."""
    for command in (*COMPOSED, *SUMMARIES):
        stage = find_stage(command)
        if any(key in tree for key in stage.sections):
            return stage
    return find_stage("train")
