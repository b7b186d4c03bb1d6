"""The config's section about the model.

It says where the model comes from, and how it is held, extended and trained.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grpo.config.reading import Section


class Lora(Section):
    """Low-rank additions to the model's linear layers: their rank, and alpha for their scale."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)  # the addition is alpha / rank times B A


class Qat(Section):
    """Quantisation-aware training: the forward pass rounds as `grpo quantize` will.

    For sft, and for distill's ways sequence and soft.
    """

    scheme: Literal["int8", "int8_tensor", "int4"] = "int4"
    group_size: int = Field(32, ge=2)  # int4


class Rope(Section):
    """A longer context by other rotary frequencies.

    It is written into the model's config, so that learner, engine and final model agree.
    """

    # YaRN 2309.00071; linear: position interpolation 2306.15595
    type: Literal["yarn", "linear", "dynamic"] = "yarn"
    factor: float = Field(gt=1)  # times the context
    # context the model was trained at; default: its config's
    original_tokens: int | None = Field(None, ge=1)


class Model(Section):
    """Where the model comes from, and how it is held, extended and trained."""

    # hub id, local Hugging Face directory, or `tiny-llama` / `tiny-qwen2` / `tiny-qwen3` (made on
    # the spot, random weights)
    path: str
    revision: str | None = None  # hub revision
    # of the forward pass; the optimizer's master weights are always float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # packed: ours, no padding, a group's prompt once
    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] = "packed"
    # one more forward pass for activations of one layer at a time
    gradient_checkpointing: bool = False
    # model that the KL is measured to, and that algorithm.advantage=teacher asks; default: the
    # start model
    teacher: str | None = None
    # train low-rank additions to all linear layers but the head; wants ten times the learning rate
    lora: Lora | None = None
    rope: Rope | None = None  # a longer context; of a model that has none yet
    qat: Qat | None = None  # learn with the rounding of fewer bits in the forward pass
    # logits in float32, in the learner and in the engine (MiniMax-M1, ScaleRL)
    float32_head: bool = False
    # mixtures of experts: weight of the load-balancing loss
    router_aux_coef: float = Field(0.0, ge=0)
    freeze_router: bool = False  # mixtures of experts: the router stays as it is
    # config of a supervised start (`grpo sft`) from `path`, made in the run's directory before its
    # first rollout
    warm_start: str | None = None

    @property
    def packed(self) -> bool:
        """Whether micro-batches are streams without padding (grpo/learning/packing.py)."""
        return self.attention == "packed"

    def check_shared(self, sequence_parallel: int) -> None:
        """Raises ValueError for a model whose sequences ranks cannot share."""
        if sequence_parallel > 1 and (not self.packed or self.router_aux_coef):
            raise ValueError(
                "learner.sequence_parallel needs model.attention=packed, and no "
                "model.router_aux_coef"
            )
