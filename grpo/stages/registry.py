"""All kinds of stages, by command.

A new kind is a module in this package that defines `STAGE`, and a line in `SUMMARIES`. The module
is imported when its kind is requested, so that the command line starts quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.stages.stage import Stage

# Help text by command, in the order of `grpo --help`. The command is also the name of the module.
SUMMARIES = {
    "sft": "fine-tune on worked solutions",
    "train": "train with GRPO",
    "collect": "sample completions and keep the correct, readable ones as traces",
    "distill": "distill a teacher into a student: from its texts, its distribution, or on-policy",
    "quantize": "convert a finished model to int8 and int4, and evaluate it before and after",
    "eval": "evaluate a model with a config's prompts and rewards; or compare two evaluations: "
    "`grpo eval RUN RUN`; or let a model solve one problem: --ask",
    "pipeline": "run several stages in order and evaluate the model of each",
}
# A config of these commands can also have sections of other commands, so these are matched first.
COMPOSED = ("pipeline", "distill")


def find_stage(command: str) -> Stage[Any]:
    """Returns the kind of stage that a command runs."""
    stage: Stage[Any] = importlib.import_module(f"grpo.stages.{command}").STAGE
    return stage


def stage_for_config(tree: dict[str, Any]) -> Stage[Any]:
    """Returns the kind of stage that a config's sections identify, `train` by default.

    Args:
        tree: The config as a tree, for example `{"run_dir": "runs/x", "sft": {"updates": 5}}`.
    """
    for command in (*COMPOSED, *SUMMARIES):
        stage = find_stage(command)
        # A dumped config has the keys of unused sections, with the value None.
        if any(tree.get(key) is not None for key in stage.sections):
            return stage
    return find_stage("train")
