"""The receiving ends of a weight sync, in vLLM's processes.

They are engines of vLLM's weight-transfer interface that check all that they receive.

`MemoryTransfer` is written after vLLM 0.32's IPC engine. It differs in two points: it does no
device synchronisation (the base class assumes an accelerator), and it packs a tied output head and
a layer's experts again.
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

from grpo.engines.transfer.weights import Arrivals, read, tied_head


class Checked:
    """Passes all that a transfer engine of vLLM's receives through `Arrivals`.

    It comes before that engine among the bases. `Arrivals` is in grpo/engines/transfer/weights.py.
    """

    model: Any

    def start_weight_update(self) -> None:
        super().start_weight_update()  # type: ignore[misc]
        self._arrivals = Arrivals(self.model)

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, self._arrivals
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class InPlace(Checked):
    """On a GPU most models are loaded straight into the parameters that their CUDA graphs read.

    vLLM's layer-wise reload puts a layer's new weights together beside the old ones, processes and
    copies them. A model whose weights are used as they are loaded does not need that.
    """

    def start_weight_update(self) -> None:
        if loads_in_place(self.model):
            self._arrivals = Arrivals(self.model)
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


class IpcTransfer(InPlace, IPCWeightTransferEngine):
    pass


class NcclTransfer(InPlace, NCCLWeightTransferEngine):
    pass


@dataclass
class InitInfo(WeightTransferInitInfo):
    pass


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str  # of the memory or the file that the tensors lie in
    names: list[str]  # in the order in which they were sent


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
        self.model.load_weights(read(update_info.path, update_info.names))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        retie_head(self.model)
        repack_experts(self.model)

    def shutdown(self) -> None:
        pass


class MemoryTransfer(Checked, _MemoryTransfer):
    pass


def retie_head(model: Any) -> None:
    """Points a tied head at the embedding's new weight and packs it again.

    A reload leaves its packed copy as it was (vLLM 0.32, CPU).
    """
    head = tied_head(model)
    if head is not None:
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Brings a layer's experts into their kernel's layout.

    A reload leaves them as they were sent (vLLM 0.32, CPU).
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
