"""Transport `ipc`: CUDA IPC between two processes on one GPU, with vLLM's transfer engine."""

from __future__ import annotations

from typing import Any, ClassVar

from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver

MIN_BUFFER_BYTES = 2**30


class IpcSender:
    """Sends the weights in packed buffers of GPU memory."""

    backend: ClassVar[str] = "grpo_ipc"
    keeps_weights: ClassVar[bool] = False

    def __init__(self, options: SenderOptions) -> None:
        """Sets the buffer size. `options` are not used."""
        self.buffer_bytes = MIN_BUFFER_BYTES
        self._trainer: Any = None  # vLLM's sender, created by the first send

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight. Raises EngineError if the receiver failed."""
        if self._trainer is None:
            self._trainer = self._create_trainer(stream, receiver)
        self._trainer.client = receiver
        self._trainer.source = stream
        self._trainer.send_weights()

    def _create_trainer(self, stream: WeightStream, receiver: WeightReceiver) -> Any:
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCTrainerInitInfo,
            IPCTrainerWeightTransferEngine,
        )

        # The buffer must hold the largest tensor. The embedding of a 7B model exceeds 1 GiB.
        max_tensor_bytes = max(info.num_bytes for info in stream.metadata())
        self.buffer_bytes = max(self.buffer_bytes, max_tensor_bytes)
        init_info = IPCTrainerInitInfo(
            rank=0, packed=True, packed_buffer_size_bytes=self.buffer_bytes
        )
        source: Any = stream  # `WeightStream` does not inherit from vLLM's `WeightSource`
        return IPCTrainerWeightTransferEngine.trainer_init(
            init_info, client=receiver, source=source
        )

    def close(self) -> None:
        """Does nothing: each send frees its buffers."""
