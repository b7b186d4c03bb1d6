"""The receiving side of a weight sync, inside vLLM's processes.

The classes implement vLLM's weight-transfer interface and verify every weight that they receive.

`MemoryTransfer` follows vLLM 0.32's IPC engine with two differences. It does not synchronize the
device after an update, because vLLM's base class does so with a call that needs an accelerator.
After a reload it packs a tied output head and the experts of each layer again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.attention.backend import AttentionImplBase

from grpo.engines.transfer.checksums import ArrivalCheck, tied_head
from grpo.engines.transfer.layout import read_tensors


class ChecksArrivals:
    """Mixin for a transfer engine of vLLM: passes the received weights through `ArrivalCheck`.

    List it before the transfer engine among the base classes.
    """

    model: Any

    def start_weight_update(self) -> None:
        """Begins an update and its check."""
        super().start_weight_update()  # type: ignore[misc]
        self._arrivals = ArrivalCheck(self.model)

    def receive_weights(self, update_info: Any) -> None:
        """Loads weights through the check. Raises RuntimeError naming the wrong or missing ones."""
        model = self.model
        # The transfer engine calls `self.model.load_weights`.
        self.model = self._arrivals
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class LoadsInPlace(ChecksArrivals):
    """Mixin: loads weights directly into the parameters that CUDA graphs read, where possible.

    vLLM's layer-wise reload collects the new weights of a layer in additional memory, processes
    them and copies the result. A model that uses its weights unprocessed does not need the reload.
    """

    def start_weight_update(self) -> None:
        """Begins an update. Skips the layer-wise reload if the model does not need it."""
        if loads_in_place(self.model):
            self._arrivals = ArrivalCheck(self.model)
        else:
            super().start_weight_update()


def loads_in_place(model: Any) -> bool:
    """Returns whether a model on a GPU uses its weights unprocessed.

    That is the case if no layer packs, shuffles or quantizes its weights after loading, or derives
    other tensors from them.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method) not in (
            UnquantizedLinearMethod,
            UnquantizedEmbeddingMethod,
        ):
            return False
        if hasattr(module, "process_weights_after_loading") and not _is_plain_attention(module):
            return False
    return True


def _is_plain_attention(module: Any) -> bool:
    """Returns whether a module is an attention layer that only sets its scales after loading.

    The scales are not part of a weight sync.
    """
    if type(module) is not Attention:
        return False
    return (
        type(module.impl).process_weights_after_loading
        is AttentionImplBase.process_weights_after_loading
    )


class IpcTransfer(LoadsInPlace, IPCWeightTransferEngine):
    """Receives weights through CUDA IPC (transport `ipc`)."""


class NcclTransfer(LoadsInPlace, NCCLWeightTransferEngine):
    """Receives weights through an NCCL broadcast (transport `nccl`)."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """No fields: shared memory and files need no connection."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The location of the weights of one update.

    Attributes:
        path: the path of the shared memory or of the file.
        names: the names of the tensors in the order of sending.
    """

    path: str
    names: list[str]


class _MemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """`MemoryTransfer` without the check of `ChecksArrivals`, which precedes it as a mixin."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model
        model.load_weights(read_tensors(update_info.path, update_info.names))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        retie_head(self.model)
        repack_experts(self.model)

    def shutdown(self) -> None:
        pass


class MemoryTransfer(ChecksArrivals, _MemoryTransfer):
    """Reads weights from shared memory or from a file (transports `memory` and `file`)."""


def retie_head(model: Any) -> None:
    """Sets the weight of a tied head to the embedding's new weight and packs it again.

    vLLM 0.32's reload does not update the packed copy of the head on a CPU.
    """
    head = tied_head(model)
    if head is not None:
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Packs the experts of every layer into the layout of their kernel.

    vLLM 0.32's reload leaves them in the layout of the transfer on a CPU.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
