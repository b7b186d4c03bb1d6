"""LoRA through peft.

Adapters inside the model, merged on the way to the engine, saved beside the merged model.

Merged weights go through the one sync that canary and probe prove, at the model's own speed; vLLM's
adapters would need a second way in and slow every decoding step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.learning import models, quantization
from grpo.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from grpo.config import Config, RunConfig
    from grpo.config.model import Lora

ADAPTER = "default"


def add(model: Any, settings: Lora, base: str, seed: int) -> None:
    """Puts adapters on every linear layer but the head, in place, and freezes the rest.

    `base`: where the model came from, to be noted.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if any(parameter.ndim == 3 for parameter in model.parameters()):
        raise UserError(
            "model.lora: this model keeps a layer's experts in one tensor, which adapters do not "
            "reach: train all weights"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # a float is as good
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    config.base_model_name_or_path = base
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    model.peft_config = {ADAPTER: config}


def load_reference(config: Config, model_dir: Path, teacher_dir: Path | None) -> Any:
    """Returns the model that the KL is measured to, or the teacher.

    Returns None where there is none, or where it lies under the adapters.

    Args:
        config: the run's config.
        model_dir: the start of the policy.
        teacher_dir: of `model.teacher`, None without one.
    """
    attention = config.model.attention
    if teacher_dir is not None:
        return models.load_model(teacher_dir, attention)
    if config.algorithm.kl_coef > 0 and not config.model.lora:
        return models.load_model(model_dir, attention)
    return None


def load_policy(config: RunConfig, model_dir: Path, attention: str) -> Any:
    """Returns the model to be trained, with adapters if the config asks for them."""
    model = models.load_model(model_dir, attention)
    if config.model.qat:
        quantization.learn_rounded(model, config.model.qat.scheme, config.model.qat.group_size)
    if config.model.lora:
        add(model, config.model.lora, config.model.path, config.seed)
    return model


def of(model: nn.Module) -> dict[str, Any]:
    """Returns the layers with adapters by the hub's name of their weight.

    The result is empty for a model without adapters.
    """
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def merged(weight: Tensor, layer: Any) -> Tensor:
    """Returns the weight with its adapter's addition, computed in float32."""
    delta: Tensor = layer.get_delta_weight(ADAPTER).float().to(weight.device)
    return (weight.float() + delta).to(weight.dtype)


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the one under the adapters: the reference."""
    layers = of(model).values()
    assert layers, "no reference model was loaded"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save(model: Any, target: Path) -> None:
    """Writes the adapter alone: `peft.PeftModel.from_pretrained(base, target)` reads it."""
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
