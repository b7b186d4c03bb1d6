"""The receiving side of a weight sync, inside vLLM's processes.

The classes implement vLLM's weight-transfer interface and check every weight that they receive.

`MemoryTransfer` follows vLLM 0.32's IPC engine with two differences: it does no device
synchronisation (the base class assumes an accelerator), and it packs a tied output head and a
layer's experts again.
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
    """Mixin: every weight that a transfer engine of vLLM receives passes through `ArrivalCheck`.

    It must come before that engine among the base classes.
    """

    model: Any

    def start_weight_update(self) -> None:
        """Begins an update and a new check."""
        super().start_weight_update()  # type: ignore[misc]
        self._arrivals = ArrivalCheck(self.model)

    def receive_weights(self, update_info: Any) -> None:
        """Loads weights through the check. Raises RuntimeError naming what is wrong."""
        model = self.model
        self.model = self._arrivals
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class LoadsInPlace(ChecksArrivals):
    """Mixin: weights are loaded straight into the parameters that CUDA graphs read.

    vLLM's layer-wise reload assembles a layer's new weights beside the old ones, processes and
    copies them. A model that uses its weights as loaded does not need that.
    """

    def start_weight_update(self) -> None:
        """Begins an update, without the layer-wise reload where the model does not need it."""
        if loads_in_place(self.model):
            self._arrivals = ArrivalCheck(self.model)
        else:
            super().start_weight_update()


def loads_in_place(model: Any) -> bool:
    """Returns whether a model on a GPU uses its weights as they are loaded.

    Then no layer packs, shuffles, quantises or derives anything of its weights after loading.
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
    """Returns whether a layer, after loading, only sets its scales, which are not sent."""
    if type(module) is not Attention:
        return False
    return (
        type(module.impl).process_weights_after_loading
        is AttentionImplBase.process_weights_after_loading
    )


class IpcTransfer(LoadsInPlace, IPCWeightTransferEngine):
    """Receives weights by CUDA IPC (transport `ipc`)."""


class NcclTransfer(LoadsInPlace, NCCLWeightTransferEngine):
    """Receives weights by an NCCL broadcast (transport `nccl`)."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What a connection to shared memory or a file needs: nothing."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where the weights of one update are.

    Attributes:
        path: of the shared memory or the file.
        names: of the tensors, in the order sent.
    """

    path: str
    names: list[str]


class _MemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(read_tensors(update_info.path, update_info.names))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        retie_head(self.model)
        repack_experts(self.model)

    def shutdown(self) -> None:
        pass


class MemoryTransfer(ChecksArrivals, _MemoryTransfer):
    """Reads weights from shared memory or a file (transports `memory` and `file`)."""


def retie_head(model: Any) -> None:
    """Points a tied head at the embedding's new weight and packs it again.

    A reload leaves its packed copy as it was (vLLM 0.32, CPU).
    """
    head = tied_head(model)
    if head is not None:
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Packs every layer's experts into the layout of their kernel.

    A reload leaves them in the layout in which they were sent (vLLM 0.32, CPU).
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
