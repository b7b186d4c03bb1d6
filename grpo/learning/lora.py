"""LoRA with peft: adds adapters to a model, merges them, and loads the models of a run.

The engine receives merged weights. They take the same path as the weights of a full fine-tuning,
which the canary and the probe verify, and sampling runs at the speed of the plain model. vLLM's own
adapters would need a second path and would slow down every decoding step.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grpo.learning import models, quantization
from grpo.learning.alignment import TokenPair
from grpo.learning.policy import Reference
from grpo.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from grpo.config import RunConfig, TrainConfig
    from grpo.config.model import LoraSettings

T = TypeVar("T")
ADAPTER = "default"  # peft's name of the adapter
MEASURED_LAYERS = 32  # layers that `merged_share` looks at


def add_adapters(model: Any, settings: LoraSettings, base: str, seed: int) -> None:
    """Adds adapters to every linear layer except the output head, in place.

    All other weights are frozen.

    Args:
        model: a transformers model.
        settings: the config section `model.lora`.
        base: path or hub id of the base model, recorded in the adapter's config.
        seed: seed of the adapters' initial weights. The global random state does not change.

    Raises:
        UserError: the model keeps the experts of a layer in a single tensor.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if any(parameter.ndim == 3 for parameter in model.parameters()):
        raise UserError(
            "model.lora: adapters are not supported for a model that keeps the experts of a layer "
            "in one tensor. Remove model.lora to train all weights."
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # peft accepts a float
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    config.base_model_name_or_path = base
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    model.peft_config = {ADAPTER: config}


def load_references(
    config: TrainConfig,
    model_dir: Path,
    teacher_dirs: Mapping[str, Path],
    common_tokens: Mapping[str, Sequence[TokenPair]] | None = None,
) -> dict[str, Reference]:
    """Returns the teachers by name, or without any the reference model of the KL with the name "".

    There is none if the run needs none, or if the policy has adapters: without them the policy is
    the reference (`adapters_disabled`).

    Args:
        config: the run's config.
        model_dir: directory of the model from which the policy starts.
        teacher_dirs: result of `models.resolve_teachers`. A directory is loaded once.
        common_tokens: those of the policy and each teacher with another vocabulary, by name.
    """
    attention = config.model.attention
    if teacher_dirs:
        loaded = {
            path: models.load_model(path, attention) for path in sorted(set(teacher_dirs.values()))
        }
        pairs = common_tokens or {}
        return {
            name: Reference(loaded[path], pairs.get(name)) for name, path in teacher_dirs.items()
        }
    if config.algorithm.kl_coef > 0 and not config.model.lora:
        return {"": Reference(models.load_model(model_dir, attention))}
    return {}


def load_policy(config: RunConfig, model_dir: Path, attention: str) -> Any:
    """Returns the model to train, with QAT and adapters if the config sets them.

    Args:
        config: the run's config.
        model_dir: directory of the model from which the policy starts.
        attention: name of the attention implementation.
    """
    model = models.load_model(model_dir, attention)
    if config.model.qat:
        quantization.enable_qat(model, config.model.qat.scheme, config.model.qat.group_size)
    if config.model.lora:
        add_adapters(model, config.model.lora, config.model.path, config.seed)
    return model


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers that have adapters, by the hub name of their weight.

    For example `{"model.layers.0.self_attn.q_proj.weight": LoraLayer, ...}`; empty for a model
    without adapters.
    """
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def merged_weight(weight: Tensor, layer: Any) -> Tensor:
    """Returns weight + scaling * B A, in the dtype of the weight. The sum is computed in float32.

    Args:
        weight: weight of the layer [out, in], without the adapter.
        layer: the layer, from `adapted_layers`.
    """
    delta: Tensor = layer.get_delta_weight(ADAPTER).float().to(weight.device)
    return (weight.float() + delta).to(weight.dtype)


def merged_share(model: nn.Module) -> float | None:
    """Returns the share of the adapters' change that is left in the merged weights.

    It is 1 if the merge is exact. In bfloat16 a change of less than 2^-9 of a weight is lost by
    rounding: with entries of 1e-5, 3 % is left of the change of weights around 0.02.

    The share is the projection of merged - base onto the change, sum(change * (merged - base)) /
    sum(change^2), over MEASURED_LAYERS random layers. It is `None` for a model without adapters,
    and as long as the adapters change nothing. (An engine in bfloat16 rounds the weights of a
    float32 model, too, but without a bias: their values do not lie on the grid of bfloat16.)
    """
    kept = 0.0
    total = 0.0
    for layer in _measured(list(adapted_layers(model).values())):
        weight = layer.get_base_layer().weight.data
        change = layer.get_delta_weight(ADAPTER).float().to(weight.device)
        merged_change = merged_weight(weight, layer).float() - weight.float()
        kept += float((change * merged_change).sum())
        total += float(change.square().sum())
    return kept / total if total else None


def _measured(layers: Sequence[T]) -> list[T]:
    """Returns at most MEASURED_LAYERS of the layers, the same ones in every call.

    They are random because the kinds of projections repeat in every layer of the transformer.
    """
    return random.Random(0).sample(layers, min(MEASURED_LAYERS, len(layers)))


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Disables the adapters within the context: the model is then the reference."""
    layers = adapted_layers(model).values()
    assert layers, "the model has no adapters, and no reference model was loaded"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: Any, target: Path) -> None:
    """Writes the adapter without the base model to the directory `target`.

    `peft.PeftModel.from_pretrained(base_model, target)` reads it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(target)
