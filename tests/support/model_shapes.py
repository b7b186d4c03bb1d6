"""Sizes of published models, from their configs on the hub."""

from typing import NamedTuple

from grpo.metrics.roofline import ModelShape


class Dimensions(NamedTuple):
    hidden_size: int
    num_layers: int
    num_kv_heads: int  # of 128 dimensions
    vocab_size: int
    num_weights: int
    tied: bool  # input and output embeddings share their weights


def bfloat16_shape(model):
    """Returns the sizes of a model in bfloat16."""
    num_embeddings = 1 if model.tied else 2
    embedding_weights = model.vocab_size * model.hidden_size
    return ModelShape(
        num_weights=model.num_weights,
        body_weights=model.num_weights - embedding_weights * num_embeddings,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        attention_width=model.hidden_size,
        kv_bytes_per_token=2 * model.num_layers * model.num_kv_heads * 128 * 2,
        bytes_per_weight=2,
    )


QWEN = {  # Qwen2.5
    "0.5B": bfloat16_shape(Dimensions(896, 24, 1, 151_936, 494_032_768, tied=True)),
    "1.5B": bfloat16_shape(Dimensions(1536, 28, 2, 151_936, 1_543_714_304, tied=True)),
    "3B": bfloat16_shape(Dimensions(2048, 36, 2, 151_936, 3_085_938_688, tied=True)),
    "7B": bfloat16_shape(Dimensions(3584, 28, 4, 152_064, 7_615_616_512, tied=False)),
    "14B": bfloat16_shape(Dimensions(5120, 48, 8, 152_064, 14_770_033_664, tied=False)),
    "32B": bfloat16_shape(Dimensions(5120, 64, 8, 152_064, 32_763_876_352, tied=False)),
}
LLAMA = {  # Llama 3
    "1B": bfloat16_shape(Dimensions(2048, 16, 4, 128_256, 1_235_814_400, tied=True)),
    "8B": bfloat16_shape(Dimensions(4096, 32, 8, 128_256, 8_030_261_248, tied=False)),
}
