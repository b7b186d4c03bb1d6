"""The config section `model`: the source, precision and trainable weights of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grpo.config.reading import Section


class LoraSettings(Section):
    """Low-rank adapters: the addition to a weight is `alpha / rank` times B A."""

    rank: int = Field(16, ge=1, description="Rank of the adapter matrices A and B.")
    alpha: float = Field(32.0, gt=0, description="Scale: the addition is alpha / rank times B A.")


class QatSettings(Section):
    """Quantization-aware training: the forward pass rounds as `grpo quantize` does.

    For `grpo sft`, and for `grpo distill` with way sequence or soft.
    """

    scheme: Literal["int8", "int8_tensor", "int4"] = Field(
        "int4", description="Quantization scheme, as in `quantize.schemes`."
    )
    group_size: int = Field(
        32, ge=2, description="Number of weights that share a scale, for scheme int4."
    )


class RopeSettings(Section):
    """A context extension by scaled rotary frequencies.

    It is written into the model's config, so that learner, engine and final model agree.
    """

    type: Literal["yarn", "linear", "dynamic"] = Field(
        "yarn",
        description="Scaling method: YaRN (2309.00071), linear position interpolation "
        "(2306.15595), or dynamic scaling.",
    )
    factor: float = Field(gt=1, description="Ratio of the extended context to the original one.")
    original_tokens: int | None = Field(
        None,
        ge=1,
        description="Context length in tokens that the model was trained with. "
        "Default: from the model's config.",
    )


class ModelSettings(Section):
    """The model that is trained: its source, precision, attention and trainable weights."""

    path: str = Field(
        description="Hub id, local Hugging Face directory, or one of the built-in models with "
        "random weights, such as tiny-llama, tiny-qwen2 and tiny-qwen3 (`TINY_MODELS` in "
        "`grpo/learning/models.py`). `grpo eval` also accepts a run directory."
    )
    revision: str | None = Field(
        None, description="Revision of the model on the hub. Default: the main branch."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Precision of the forward pass. The optimizer's master weights are always "
        "float32.",
    )
    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] = Field(
        "packed",
        description="Attention implementation of the learner. `packed` is grpo's own: it needs no "
        "padding and processes a group's prompt once. The others are those of transformers.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the input of each layer and recompute its other activations in the "
        "backward pass. This saves memory and costs one more forward pass.",
    )
    teacher: str | None = Field(
        None,
        description="Hub id or directory of the model to which the KL is measured, and from which "
        "the policy learns with `algorithm.advantage: teacher` or `teacher_coef`. Default: the KL "
        "is measured to the start model. `grpo distill` requires a teacher.",
    )
    teachers: dict[str, str] = Field(
        {},
        description="Teachers of single data sets, by their names in `data.mixture`: `{math: "
        "runs/math/final, code: runs/code/final}`. `teacher` teaches all others. All are in the "
        "learner's memory. For `grpo train`, and `grpo distill` with way=on_policy.",
    )
    lora: LoraSettings | None = Field(
        None,
        description="Train low-rank adapters on all linear layers except the head, and freeze the "
        "weights. Adapters need about ten times the learning rate.",
    )
    rope: RopeSettings | None = Field(
        None,
        description="Extend the context of a model whose context has not been extended yet.",
    )
    qat: QatSettings | None = Field(
        None,
        description="Quantization-aware training: round to fewer bits in the forward pass.",
    )
    float32_head: bool = Field(
        False,
        description="Compute the logits in float32 in learner and engine (MiniMax-M1, ScaleRL).",
    )
    router_aux_coef: float = Field(
        0.0,
        ge=0,
        description="Coefficient of the load-balancing loss of a mixture of experts (Switch "
        "Transformer), over the completion tokens of an update. Above 0, an update takes one more "
        "forward pass, which counts the tokens of each expert.",
    )
    freeze_router: bool = Field(
        False, description="Do not train the router of a mixture of experts."
    )
    warm_start: str | None = Field(
        None,
        description="Path of a `grpo sft` config. Before the first rollout, `grpo train` "
        "fine-tunes `path` with it, in the folder `warm_start` of the run directory.",
    )

    @property
    def all_teachers(self) -> dict[str, str]:
        """Hub ids or directories by name: `teachers`, and `teacher` with the name ""."""
        return {"": self.teacher, **self.teachers} if self.teacher else self.teachers

    @property
    def is_packed(self) -> bool:
        """Whether micro-batches are streams without padding (grpo/learning/packing.py)."""
        return self.attention == "packed"

    def check_sequence_parallel(self, size: int) -> None:
        """Raises ValueError if `size` ranks cannot share this model's sequences."""
        if size == 1:
            return
        if not self.is_packed or self.router_aux_coef:
            raise ValueError(
                f"learner.sequence_parallel={size} requires model.attention=packed and "
                "model.router_aux_coef=0"
            )
