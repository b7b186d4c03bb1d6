"""Mixtures of experts: hub names of expert weights, load balancing and frozen routers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


class ExpertLoad(NamedTuple):
    """How tokens are distributed over the E experts of a layer, summed over layers.

    Attributes:
        probabilities: Sum of the router's probabilities of each expert, [E], with a gradient.
        num_selected: Number of tokens that each expert processes, [E].
    """

    probabilities: Tensor
    num_selected: Tensor


def expert_load(model: Any, router_logits: Sequence[Tensor]) -> ExpertLoad:
    """Returns how N tokens are distributed over the experts.

    Args:
        model: a transformers model.
        router_logits: the logits of each layer's router, [N, E] each.
    """
    import torch

    num_experts = _num_experts(model.config)
    device = router_logits[0].device
    probabilities = torch.zeros(num_experts, device=device)
    num_selected = torch.zeros(num_experts, device=device)
    for logits in router_logits:
        layer_probabilities = logits.float().softmax(-1)
        selected = layer_probabilities.topk(model.config.num_experts_per_tok, -1).indices
        probabilities = probabilities + layer_probabilities.sum(0)
        num_selected = num_selected + torch.bincount(selected.flatten(), minlength=num_experts)
    return ExpertLoad(probabilities, num_selected)


def balance_loss(model: Any, probabilities: Tensor, num_selected: Tensor) -> Tensor:
    """Returns a micro-batch's part of the load-balancing loss of an update, a scalar [].

    The loss is E * sum over experts of (share of tokens * mean probability), with shares and means
    over the tokens of all layers. At a balanced load it equals the number of experts per token.
    The shares have no gradient, so the parts of all micro-batches add up to the loss of the update.

    Args:
        model: a transformers model with E experts per layer.
        probabilities: `ExpertLoad.probabilities` of the micro-batch, [E].
        num_selected: `ExpertLoad.num_selected` of the whole update, on all ranks, [E].

    Source: Switch Transformer 2101.03961 Eq. 4-6, over all layers as in transformers, and over the
    whole batch as in 2501.11873: a loss per micro-batch would demand a balanced load of each one.
    """
    num_tokens = num_selected.sum() / model.config.num_experts_per_tok  # of all layers
    shares = num_selected / num_tokens
    mean_probabilities = probabilities / num_tokens
    loss: Tensor = len(shares) * (shares * mean_probabilities).sum()
    return loss


def _num_experts(config: Any) -> int:
    for key in NUM_EXPERTS_KEYS:
        if hasattr(config, key):
            num_experts: int = getattr(config, key)
            return num_experts
    raise ValueError(f"{config.model_type}: none of {', '.join(NUM_EXPERTS_KEYS)} in its config")
