"""Tiny models with random weights, and the config of a training run that takes seconds."""

from grpo import config as configs

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
