"""Chooses the transport of a run: the only place that knows all of them."""

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

# the entry point of pyproject.toml, by which vLLM's processes load our receivers
PLUGIN = "grpo.engines.servers.plugin:register"

SENDERS: dict[str, type[WeightSender]] = {
    "memory": MemorySender,
    "file": FileSender,
    "nccl": NcclSender,
}


def choose_sender(servers: configs.Servers | None) -> type[WeightSender]:
    """Returns the sender class of a pool of servers, or of the child process if there are none.

    Raises UserError if this machine cannot use what `engine.servers.transfer` names.
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
    """Raises UserError unless vLLM's processes will load our receiving engines."""
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(plugin.value == PLUGIN for plugin in plugins):
        raise UserError(
            "engine.servers: vLLM does not see grpo's plugin: install the package again "
            "(./launch/setup.sh)"
        )
