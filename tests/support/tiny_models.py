"""Tiny models with random weights, and a config of a run on one that takes seconds."""

from grpo import config as configs

TINY_SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
MLA = {"tiny-deepseek-v3": {"num_key_value_heads": 2, "q_lora_rank": 32, "head_dim": 64}}


class Weights(dict):
    """Named tensors as a learner gives them to a sync."""

    def __iter__(self):
        return iter(self.items())

    def layout(self):
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.items()]


def tiny_config(run_dir, model_dir, **sections) -> configs.TrainConfig:
    """Returns a config of a run that takes seconds; sections are merged into it."""
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
        tree[name] = (
            {**tree.get(name, {}), **section}
            if isinstance(section, dict) and name != "rewards"
            else section
        )
    return configs.parse(tree)
