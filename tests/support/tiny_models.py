"""Tiny models with random weights, and the config of a training run that takes seconds."""

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from grpo import config as configs
from grpo.learning import models

TINY_SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
# Multi-head latent attention: these values differ from TINY_SHAPE.
MLA = {"tiny-deepseek-v3": {"num_key_value_heads": 2, "q_lora_rank": 32, "head_dim": 64}}


class Weights(dict):
    """Tensors by name, with the interface of a learner's weights (grpo.engines.Weights)."""

    def __iter__(self):
        """Yields `(name, tensor)`."""
        return iter(self.items())

    def layout(self):
        """Returns `(name, dtype, shape)` of every tensor."""
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.items()]


# How a word or a number becomes pieces before they are merged. Qwen splits numbers into digits,
# Llama 3 into groups of three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merging_tokenizer(texts, *, vocabulary, digits=1, end="<|end|>", normalizer=None):
    """Returns a byte-level BPE like those of Qwen (`digits=1`) and Llama 3 (`digits=3`).

    Args:
        texts: The texts from which the merges are learned.
        vocabulary: The number of tokens, at least 258.
        digits: The longest token of a number.
        end: The EOS token.
        normalizer: Name of a normalizer, such as "NFC".
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", str(digits))), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<|pad|>")


def make_tiny_with(tokenizer, path, kind="tiny-llama", seed=0, **shape):
    """Writes a tiny model with random weights and this tokenizer."""
    models.make_tiny(
        kind,
        path,
        seed,
        **(TINY_SHAPE | {"initializer_range": 0.1} | shape),
        vocab_size=len(tokenizer) + 3,  # padded, as in Qwen2.5
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(path)


def tiny_config(run_dir, model_dir, **sections) -> configs.TrainConfig:
    """Returns the config of a training run that takes seconds.

    Args:
        run_dir: The run directory.
        model_dir: Directory of the model.
        sections: Values of the config's sections by name. The keys of a section are merged into the
            keys below. `rewards` and values that are not sections replace those below.
    """
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": str(model_dir), "dtype": "float32"},
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48},
        "sampling": {"max_tokens": 12},
        "rewards": {"accuracy": 1.0, "format": 0.1},
        "algorithm": {"kl_coef": 0.0},
        "train": {"rollouts": 2, "problems": 4, "group_size": 4},
        "learner": {"lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 256},
        "engine": {"kv_cache_gb": 0.05, "max_sequences": 32, "timeout_s": 60},
        "eval": {"every": 0},
        "checkpoint": {"every": 1},
        "logging": {"progress": "off"},
    }
    for name, section in sections.items():
        if isinstance(section, dict) and name != "rewards":
            tree[name] = {**tree.get(name, {}), **section}
        else:
            tree[name] = section
    return configs.parse(tree)
