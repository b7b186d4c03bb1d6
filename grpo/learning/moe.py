"""Mixtures of experts.

The hub's names of fused expert weights, the router's load-balancing loss, and a router that stays
as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grpo.types import UserError

if TYPE_CHECKING:
    from torch import Tensor


def hub_weights(model: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a weight under its names on the hub, which are vLLM's.

    Transformers 5 keeps a layer's experts in one tensor [E, out, in].
    """
    if weight.ndim != 3:
        yield name, weight
        return
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, {name: weight}).items()


def check(model: Any, aux_coef: float, freeze: bool) -> None:
    """Freezes the routers if asked.

    Raises UserError when the model has none, or no load-balancing loss.
    """
    routers = [module for module in model.modules() if "Router" in type(module).__name__]
    if (aux_coef or freeze) and not routers:
        raise UserError(
            f"model.router_aux_coef and freeze_router: a {model.config.model_type} has no router"
        )
    if aux_coef and getattr(model.config, "router_aux_loss_coef", None) is None:
        raise UserError(
            f"model.router_aux_coef: a {model.config.model_type} balances its experts without a "
            "loss"
        )
    for parameter in (
        parameter for router in routers for parameter in router.parameters() if freeze
    ):
        parameter.requires_grad_(False)


def balance_loss(model: Any, router_logits: Any, mask: Tensor | None) -> Tensor:
    """Returns experts x sum over experts of (share of tokens x mean probability), over all layers.

    Its minimum is 1 x the experts per token.

    Source: Switch Transformer 2101.03961 Eq. 4-6, as transformers computes it. `mask` [B, T]: which
    positions count.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    experts = next(
        getattr(model.config, key)
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
        if hasattr(model.config, key)
    )
    found = load_balancing_loss_func(
        tuple(router_logits), experts, model.config.num_experts_per_tok, mask
    )
    assert not isinstance(found, int), "the model gave no router logits"
    return found
