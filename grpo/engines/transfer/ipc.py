"""Transport `ipc`: CUDA IPC between two processes on one GPU, by vLLM's own engine."""

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
        """Does nothing yet: vLLM's sender is made at the first send. `options` are not used."""
        self.buffer_bytes = MIN_BUFFER_BYTES
        self._trainer: Any = None

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight. Raises EngineError when the receiver does."""
        if self._trainer is None:
            self._trainer = self._make_trainer(stream, receiver)
        self._trainer.client = receiver
        self._trainer.source = stream
        self._trainer.send_weights()

    def _make_trainer(self, stream: WeightStream, receiver: WeightReceiver) -> Any:
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCTrainerInitInfo,
            IPCTrainerWeightTransferEngine,
        )

        # a 7B model's embedding has more than 1 GiB
        largest = max(info.num_bytes for info in stream.metadata())
        self.buffer_bytes = max(self.buffer_bytes, largest)
        init_info = IPCTrainerInitInfo(
            rank=0, packed=True, packed_buffer_size_bytes=self.buffer_bytes
        )
        source: Any = stream
        return IPCTrainerWeightTransferEngine.trainer_init(
            init_info, client=receiver, source=source
        )

    def close(self) -> None:
        """Does nothing: the buffers belong to a send."""
