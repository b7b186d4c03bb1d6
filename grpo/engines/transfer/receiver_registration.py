"""Registers grpo's receiving engines with vLLM, in the child process and in server processes."""

from __future__ import annotations

import contextlib

# `WeightSender.backend` -> the class in receivers.py
RECEIVING_ENGINES = {
    "grpo_memory": "MemoryTransfer",
    "grpo_file": "MemoryTransfer",
    "grpo_ipc": "IpcTransfer",
    "grpo_nccl": "NcclTransfer",
}


def register_receiving_engines() -> None:
    """Registers the classes of receivers.py under the names of RECEIVING_ENGINES.

    Calling it again has no effect.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, class_name in RECEIVING_ENGINES.items():
        with contextlib.suppress(ValueError):  # already registered
            WeightTransferEngineFactory.register_engine(
                backend, "grpo.engines.transfer.receivers", class_name
            )
