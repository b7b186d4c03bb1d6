"""Mixtures of experts: hub names of expert weights, load balancing and frozen routers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which transformers configs hold the number of experts per layer.
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def hub_weights(model: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a weight under the names that it has in the model's files on the hub.

    vLLM loads weights by these names. Transformers 5 keeps the experts of a layer in one tensor
    [E, out, in], where the hub has one weight [out, in] per expert. All other weights keep their
    names.

    Args:
        model: the transformers model.
        name: name of the weight in the model.
        weight: the weight.
    """
    if weight.ndim != 3:
        yield name, weight
        return
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, {name: weight}).items()


def require_no_experts(model_dir: Path, key: str) -> None:
    """Raises UserError if a model is a mixture of experts, which a config key does not support.

    Args:
        model_dir: the directory of the model.
        key: the key, for the error message.
    """
    config = json.loads((model_dir / "config.json").read_text())
    if any(config.get(name) for name in NUM_EXPERTS_KEYS):
        raise UserError(
            f"{key} does not support mixtures of experts: PyTorch has no deterministic operation "
            "that counts the tokens of each expert. Set it to false"
        )


def configure_routers(model: Any, aux_coef: float, freeze: bool) -> None:
    """Checks the config's router options against the model, and freezes the routers if set.

    Args:
        model: a transformers model.
        aux_coef: `model.router_aux_coef`.
        freeze: `model.freeze_router`.

    Raises:
        UserError: an option is set, but the model has no router or no load-balancing loss.
    """
    routers = [module for module in model.modules() if "Router" in type(module).__name__]
    model_type = model.config.model_type
    if (aux_coef or freeze) and not routers:
        raise UserError(
            "model.router_aux_coef and model.freeze_router are for mixtures of experts, but a "
            f"{model_type} model has no router. Remove both keys."
        )
    if aux_coef and getattr(model.config, "router_aux_loss_coef", None) is None:
        raise UserError(
            f"model.router_aux_coef: a {model_type} model balances its experts without a loss. "
            "Remove the key."
        )
    if freeze:
        for router in routers:
            router.requires_grad_(False)


def balance_loss(model: Any, router_logits: Any, mask: Tensor | None) -> Tensor:
    """Returns the load-balancing loss of the routers, a scalar [].

    It is E * sum over experts of (share of tokens * mean probability), with shares and means over
    the tokens of all layers. At a balanced load it equals the number of experts per token.

    Args:
        model: a transformers model with E experts per layer.
        router_logits: logits of each layer's router, from the model's output.
        mask: [B, T], 1 at the tokens that count; `None` for all tokens.

    Source: Switch Transformer 2101.03961 Eq. 4-6, as transformers computes it.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    loss = load_balancing_loss_func(
        tuple(router_logits), _num_experts(model.config), model.config.num_experts_per_tok, mask
    )
    assert not isinstance(loss, int), "the model returned no router logits"
    return loss


def _num_experts(config: Any) -> int:
    for key in NUM_EXPERTS_KEYS:
        if hasattr(config, key):
            num_experts: int = getattr(config, key)
            return num_experts
    raise ValueError(f"{config.model_type}: none of {', '.join(NUM_EXPERTS_KEYS)} in its config")
