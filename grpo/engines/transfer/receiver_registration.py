"""Makes our receiving engines known to vLLM, in the child process and in a server's processes."""

from __future__ import annotations

import contextlib

# a sender's `backend` -> the class in receivers.py
RECEIVING_ENGINES = {
    "grpo_memory": "MemoryTransfer",
    "grpo_file": "MemoryTransfer",
    "grpo_ipc": "IpcTransfer",
    "grpo_nccl": "NcclTransfer",
}


def register_receiving_engines() -> None:
    """Registers the classes of receivers.py under the names of RECEIVING_ENGINES.

    May be called several times.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, class_name in RECEIVING_ENGINES.items():
        with contextlib.suppress(ValueError):  # registered already
            WeightTransferEngineFactory.register_engine(
                backend, "grpo.engines.transfer.receivers", class_name
            )
