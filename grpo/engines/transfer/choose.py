"""Selects the transport of a run. This is the only module that imports all transports."""

from __future__ import annotations

import importlib.metadata

import torch

from grpo import config as configs
from grpo.engines.transfer.file import FileSender
from grpo.engines.transfer.interface import WeightSender
from grpo.engines.transfer.ipc import IpcSender
from grpo.engines.transfer.memory import MemorySender
from grpo.engines.transfer.nccl import NcclSender
from grpo.types import UserError

# The entry point in pyproject.toml through which vLLM's processes load grpo's receiving engines.
PLUGIN = "grpo.engines.servers.plugin:register"

# `engine.servers.transfer` -> the sender class
SENDERS: dict[str, type[WeightSender]] = {
    "memory": MemorySender,
    "file": FileSender,
    "nccl": NcclSender,
}


def choose_sender(servers: configs.ServerSettings | None) -> type[WeightSender]:
    """Returns the class of the weight sender.

    Args:
        servers: the section `engine.servers` of the config; None for an engine in a child process.

    Raises:
        UserError: this machine cannot use the transport that `engine.servers.transfer` names, or
            grpo's vLLM plugin is not installed.
    """
    has_gpu = torch.cuda.is_available()
    if servers is None:
        return IpcSender if has_gpu else MemorySender
    _check_plugin()
    if servers.transfer != "auto":
        if servers.transfer == "nccl" and not has_gpu:
            raise UserError(
                "engine.servers.transfer=nccl needs GPUs on both sides: use memory (one machine) "
                "or file (a shared directory)"
            )
        return SENDERS[servers.transfer]
    if has_gpu:
        return NcclSender
    return FileSender if servers.urls else MemorySender


def _check_plugin() -> None:
    """Raises UserError unless vLLM's processes can load grpo's receiving engines."""
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(plugin.value == PLUGIN for plugin in plugins):
        raise UserError(
            "engine.servers: grpo is not installed as a plugin of vLLM (entry point "
            "vllm.general_plugins): install grpo-trainer again (in a clone: ./launch/setup.sh)"
        )
