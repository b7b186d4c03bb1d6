"""Compares configs: of a run and of its resume, and of the ranks of one run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml

from grpo import config as configs
from grpo.config import RunConfig
from grpo.types import UserError

# Keys and sections that may change when a run is resumed.
FREE_ON_RESUME = (
    "run_dir",
    "logging",
    "checkpoint",
    "eval",
    "probe",
    "engine",
    "price",
    "reward_pool",
    "learner.timeout_s",
    "learner.threads",
    "learner.lr",
    "learner.max_grad_norm",
    "learner.skip_grad_norm",
    "train.rollouts",
    "algorithm.max_rounds",
    "algorithm.max_idle",
    "algorithm.no_signal",
)

# Keys that may differ between the ranks of a run: settings of one machine, and paths of copies that
# each node has on its own disk. A path key matches in every section.
LOCAL_KEYS = ("run_dir", "learner.threads", "logging.progress", "engine.servers.cores")
PATH_KEYS = ("path", "test_path", "warm_start", "teacher")


def require_same_config(folder: Path, config: RunConfig) -> None:
    """Raises UserError if the config differs from that of the run in `folder`.

    Keys in `FREE_ON_RESUME` may differ. Callers use it before they resume a run and before they
    reuse a finished one.
    """
    before = _flatten(_written_config(folder, config))
    after = _flatten(yaml.safe_load(configs.dump(config)))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not _may_change(key, config):
            changes.append(f"{key} was {before.get(key)}, is {after.get(key)}")
    if changes:
        raise UserError(
            f"{folder}: the config differs from the one this run was started with: "
            f"{'; '.join(changes)}. Restore it or choose another run_dir"
        )


def shared_values(config: RunConfig) -> dict[str, str]:
    """Returns the values that all ranks of a run must share: `{"learner.lr": "1e-06"}`.

    `LOCAL_KEYS` and `PATH_KEYS` are excluded, because they may differ between nodes.
    """
    values = _flatten(yaml.safe_load(configs.dump(config)))
    return {
        key: str(value)
        for key, value in values.items()
        if key not in LOCAL_KEYS and key.rpartition(".")[2] not in PATH_KEYS
    }


def _written_config(folder: Path, config: RunConfig) -> Any:
    """Returns the tree of the run's config.yaml, with defaults for missing keys."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    # A config.yaml from an older version of grpo lacks newer keys, whose defaults describe how that
    # version behaved. A tree that is no longer a valid config is compared without these defaults.
    with contextlib.suppress(UserError):
        tree = yaml.safe_load(configs.dump(configs.parse(tree, kind=type(config))))
    return tree


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a tree by dotted key: `{"train.rollouts": 20}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for name, subtree in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        values.update(_flatten(subtree, key))
    return values


def _may_change(key: str, config: RunConfig) -> bool:
    section = key.partition(".")[0]
    if section == "eval" and config.is_evaluation:
        return False
    return any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)
