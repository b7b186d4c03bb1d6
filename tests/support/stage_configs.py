"""Configs of the commands on tiny models, each a run of seconds."""

from tiny_models import tiny_config
from whole_runs import write_tree

from grpo import config as configs
from grpo.config import SftConfig


def eval_config(tmp_path, model_dir, **sections):
    tree = tiny_config(tmp_path / "run", model_dir).model_dump(mode="json")
    tree = {
        name: tree[name]
        for name in ("run_dir", "seed", "model", "data", "prompt", "sampling", "engine", "logging")
    }
    tree |= {
        "rewards": {"accuracy": 1.0, "format": 0.1},
        "eval": {"problems": 6, "samples": 2, "temperature": 1.0},
        **sections,
    }
    return write_tree(tmp_path / "config.yaml", tree)


def sft_config(run_dir, model_dir, **sections):
    tree = tiny_config(run_dir, model_dir).model_dump(mode="json")
    tree = {name: tree[name] for name in ("run_dir", "seed", "model", "data", "prompt", "logging")}
    tree |= {
        "sft": {"updates": 6, "batch_size": 4, "max_tokens": 64},
        "learner": {
            "lr": 1e-2,
            "eps": 1e-3,
            "warmup_updates": 2,
            "schedule": "linear",
            "zero_stage": 0,
            "micro_batch_tokens": 128,
        },
        "checkpoint": {"every": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return configs.parse(tree, kind=SftConfig)


def collect_config(tmp_path, model, **sections):
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
    return write_tree(tmp_path / "config.yaml", tree | sections)


def distill_config(tmp_path, tiny, **sections):
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
    return write_tree(tmp_path / "config.yaml", tree | sections)


def final_weights(run_dir):
    from safetensors.torch import load_file

    return load_file(run_dir / "final" / "model.safetensors")
