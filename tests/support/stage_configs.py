"""Configs of the commands eval, sft, collect and distill on tiny models; each run takes seconds."""

from safetensors.torch import load_file
from tiny_models import tiny_config
from whole_runs import write_yaml

from grpo import config as configs
from grpo.config import SftConfig

SFT_SECTIONS = ("run_dir", "seed", "model", "data", "prompt", "logging")
EVAL_SECTIONS = (*SFT_SECTIONS, "sampling", "engine")
# A sequence distillation that keeps texts of a teacher with random weights.
SEQUENCE_SECTIONS = {
    "collect": {"problems": 4, "samples": 4, "chunk": 4, "format": False},
    "rewards": {"finished": 1.0},
    "sft": {"updates": 2, "batch_size": 2, "max_tokens": 96},
    "prompt": {"template": "plain", "max_tokens": 48, "stop": list("etao")},
}


def eval_config(tmp_path, model_dir, **sections):
    """Writes a config of `grpo eval` and returns its path.

    Args:
        tmp_path: Directory for the config and, in `run`, the run directory.
        model_dir: Directory of the model.
        sections: Sections that replace those of the config.
    """
    train_tree = tiny_config(tmp_path / "run", model_dir).model_dump(mode="json")
    tree = {name: train_tree[name] for name in EVAL_SECTIONS}
    tree["rewards"] = {"accuracy": 1.0, "format": 0.1}
    tree["eval"] = {"problems": 6, "samples": 2, "temperature": 1.0}
    tree.update(sections)
    return write_yaml(tmp_path / "config.yaml", tree)


def sft_config(run_dir, model_dir, **sections):
    """Returns the config of a run of `grpo sft`.

    Args:
        run_dir: The run directory.
        model_dir: Directory of the model.
        sections: Keys to merge into the sections of the config.
    """
    train_tree = tiny_config(run_dir, model_dir).model_dump(mode="json")
    tree = {name: train_tree[name] for name in SFT_SECTIONS}
    tree["sft"] = {"updates": 6, "batch_size": 4, "max_tokens": 64}
    tree["learner"] = {
        "lr": 1e-2,
        "eps": 1e-3,
        "warmup_updates": 2,
        "schedule": "linear",
        "zero_stage": 0,
        "micro_batch_tokens": 64,  # three solutions of about 20 tokens: two micro-batches
    }
    tree["checkpoint"] = {"every": 2}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return configs.parse(tree, kind=SftConfig)


def collect_config(tmp_path, model, **sections):
    """Writes a config of `grpo collect` and returns its path.

    Args:
        tmp_path: Directory for the config and, in `run`, the run directory.
        model: Directory of the model.
        sections: Sections that replace those of the config.
    """
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48, "stop": list("etao")},
        "sampling": {"max_tokens": 12},
        "rewards": {"finished": 1.0},
        "engine": {"kv_cache_gb": 0.05, "timeout_s": 60},
        "collect": {"problems": 6, "samples": 4, "keep": 2, "chunk": 2, "format": False},
        "logging": {"progress": "off"},
    }
    return write_yaml(tmp_path / "config.yaml", tree | sections)


def distill_config(tmp_path, tiny, **sections):
    """Writes a config of `grpo distill` with a wider model as the teacher and returns its path.

    Args:
        tmp_path: Directory for the config and, in `run`, the run directory.
        tiny: The fixture `tiny`.
        sections: Sections that replace those of the config.
    """
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "path": str(tiny()),
            "teacher": str(tiny(intermediate_size=128)),
            "dtype": "float32",
        },
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48},
        "sampling": {"max_tokens": 12},
        "engine": {"kv_cache_gb": 0.05, "timeout_s": 60},
        "logging": {"progress": "off"},
        "learner": {"lr": 1e-3, "zero_stage": 1, "micro_batch_tokens": 512},
    }
    return write_yaml(tmp_path / "config.yaml", tree | sections)


def final_weights(run_dir):
    """Returns the tensors of a run's final model by name."""
    return load_file(run_dir / "final" / "model.safetensors")
