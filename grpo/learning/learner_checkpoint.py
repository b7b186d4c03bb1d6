"""Checkpoints of a DeepSpeed engine, which any number of ranks can load."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo.learning.deepspeed_setup import torch_optimizer
from grpo.run import ranks
from grpo.types import RunError

TAG = "learner"  # the folder of DeepSpeed's files in a checkpoint's directory


def save_checkpoint(deepspeed_engine: Any, directory: Path, client_state: dict[str, Any]) -> None:
    """Writes weights, optimizer state and `client_state` to a directory. All ranks must call it."""
    deepspeed_engine.save_checkpoint(
        str(directory), tag=TAG, client_state=client_state, save_latest=False
    )


def num_saved_ranks(directory: Path) -> int:
    """Returns the number of ranks between which ZeRO has split the states of a checkpoint.

    Without ZeRO it is 0, and any number of ranks can load the checkpoint.
    """
    return len(list(directory.rglob("*zero_pp_rank_*_optim_states.pt")))


def load_checkpoint(deepspeed_engine: Any, directory: Path) -> dict[str, Any]:
    """Loads the weights and the optimizer state of `save_checkpoint`. All ranks must call it.

    Returns:
        The `client_state` of `save_checkpoint`.

    Raises:
        RunError: The directory has no checkpoint.
    """
    if num_saved_ranks(directory) in (0, ranks.world_size()):
        path, client_state = deepspeed_engine.load_checkpoint(str(directory), tag=TAG)
    else:
        path, client_state = _load_from_other_world_size(deepspeed_engine, directory)
    if path is None:
        raise RunError(f"{directory}: DeepSpeed found no checkpoint in this directory")
    loaded_state: dict[str, Any] = client_state
    return loaded_state


def _load_from_other_world_size(deepspeed_engine: Any, directory: Path) -> tuple[Any, Any]:
    """Loads a checkpoint that was saved by a different number of ranks.

    Rank 0 converts it to DeepSpeed's universal format in a temporary directory.

    Returns:
        The path and the client state of DeepSpeed's `load_checkpoint`.
    """
    universal = directory.with_name(f".{directory.name}.universal.partial")

    def convert_on_rank0() -> None:
        if ranks.rank() == 0:
            _convert_to_universal(directory, universal)

    ranks.rank0_first("the universal checkpoint", convert_on_rank0)
    parameter_groups = deepspeed_engine.optimizer.param_groups
    weight_decays = [group["weight_decay"] for group in parameter_groups]
    deepspeed_engine._config.load_universal_checkpoint = True
    try:
        path, client_state = deepspeed_engine.load_checkpoint(str(universal), tag=TAG)
        # Under ZeRO-3 DeepSpeed sets the weight decay of the first group for all groups.
        for group, weight_decay in zip(parameter_groups, weight_decays, strict=True):
            group["weight_decay"] = weight_decay
        # Under ZeRO-3 DeepSpeed also shares one step counter between all parameters.
        for state in torch_optimizer(deepspeed_engine).state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        return path, client_state
    finally:
        deepspeed_engine._config.load_universal_checkpoint = False
        ranks.all_gather("the loaded checkpoint", None)  # No rank needs the directory any more.
        if ranks.rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)


def _convert_to_universal(directory: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(directory / TAG),
            output_folder=str(universal / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
