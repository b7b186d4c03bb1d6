"""vLLM's receiving end of a weight sync through shared memory or a file: an engine of its weight-transfer interface.

Written after vLLM 0.32's IPC engine; what differs: no device synchronisation (the base class assumes an accelerator), every tensor is
checked, a model that was not loaded completely is an error, and a tied output head and a layer's experts are packed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from grpo.engines._weights import SharedWeightsReader, TensorSpec


@dataclass
class InitInfo(WeightTransferInitInfo):
    pass


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str  # of the memory or the file that the tensors lie in
    specs: list[dict[str, Any]]  # a TensorSpec each


class SharedMemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._reader: SharedWeightsReader | None = None

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if self._reader is None or self._reader.path != update_info.path:
            if self._reader is not None:
                self._reader.close()
            self._reader = SharedWeightsReader(update_info.path)
        specs = [TensorSpec(**spec | {"shape": tuple(spec["shape"])}) for spec in update_info.specs]
        expected = {name for name, _ in self.model.named_parameters()}
        loaded = self.model.load_weights(self._reader.read(specs))  # type: ignore[operator]
        missing = sorted(expected - set(loaded))
        if _tied_head(self.model) is not None:
            missing = [name for name in missing if not name.endswith("lm_head.weight")]
        if missing:
            raise RuntimeError(f"weight transfer: {len(missing)} weights of the engine's model did not arrive: {', '.join(missing[:5])}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        retie_head(self.model)
        repack_experts(self.model)

    def shutdown(self) -> None:
        pass


def _tied_head(model: Any) -> Any:
    """Returns the output head if it shares the embedding's weight (vLLM then keeps a second, packed copy on a CPU)."""
    config = getattr(model, "config", None)
    head = getattr(model, "lm_head", None)
    return head if head is not None and getattr(config, "tie_word_embeddings", False) else None


def retie_head(model: Any) -> None:
    """Points a tied head at the embedding's new weight and packs it again: a reload leaves its packed copy as it was (vLLM 0.32, CPU)."""
    head = _tied_head(model)
    if head is not None:
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Brings a layer's experts into their kernel's layout: a reload leaves them as they were sent (vLLM 0.32, CPU)."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
