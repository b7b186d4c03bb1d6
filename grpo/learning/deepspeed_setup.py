"""What a learner is set up with.

This is the process group, DeepSpeed's own config, the learning rate, and what of the memory is
kept.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo import config as configs
from grpo.run import ranks
from grpo.types import RunError


def learning_rate(settings: configs.Learner, update: int, total_updates: int) -> float:
    """Returns the learning rate of an update, counted from 0.

    It warms up linearly, then is constant or goes down to `min_lr_ratio`, linearly or as a cosine.
    There is no state.
    """
    if update < settings.warmup_updates:
        return settings.lr * (update + 1) / settings.warmup_updates
    progress = (update - settings.warmup_updates) / max(1, total_updates - settings.warmup_updates)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.schedule]
    floor = 1.0 if settings.schedule == "constant" else settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * decay)


def deepspeed_config(settings: configs.Learner, dtype: str) -> dict[str, Any]:
    """Returns DeepSpeed's own config, built from ours."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    optimizer = {
        "lr": settings.lr,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    # no compiler run (nvcc), as DeepSpeed's own would need; one pass over the states
    optimizer |= {"torch_adam": True, "fused": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # the number of micro-batches varies: step() ends an update
        "managed_gradient_accumulation": False,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
    }


def parameter_groups(model: nn.Module, settings: configs.Learner) -> list[dict[str, Any]]:
    """Weight decay is for matrices; norms and biases have none."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


MAX_LOST = 3  # updates in a row whose gradient is not finite, or too large; each is skipped


def not_finite(
    update: int, loss: float, norm: float, settings: configs.Learner, times: int = MAX_LOST
) -> RunError:
    """Returns the error that ends a run whose updates were skipped, or spoiled its weights."""
    return RunError(
        f"update {update}: loss {loss}, gradient norm {norm}: not finite or above "
        f"learner.skip_grad_norm={settings.skip_grad_norm:g}, "
        f"{times} times in a row. The last checkpoint is good: go on from it with --resume and a "
        "lower "
        "learner.lr (or, if such norms are usual here, a higher skip_grad_norm)"
    )


class NormLimit:
    """Makes DeepSpeed skip an update with a gradient norm above `limit` as one that is not finite.

    `norm` is the last one. Each of DeepSpeed's optimizers has its own method to get the norm;
    there, a norm that is too large becomes infinite.
    """

    def __init__(self, optimizer: Any, limit: float) -> None:
        """Replaces the method by which DeepSpeed's `optimizer` gets its gradient norm."""
        self.norm = math.inf
        self._limit = limit
        replacements = {
            "_get_norm_groups": self._of_groups,  # ZeRO-3
            "scaled_global_norm": self._of_groups,  # ZeRO-1 and 2
            "get_grads_for_norm": self._of_gradients,  # ZeRO-1 in bfloat16
        }
        for name, replacement in replacements.items():
            original = getattr(optimizer, name, None)
            if original is not None:
                setattr(optimizer, name, functools.partial(replacement, original))

    def _of_groups(self, original: Callable[..., Any]) -> Any:
        norms = original()
        values = torch.as_tensor(norms)
        # -1 stands for one that is not finite
        is_finite = bool((values >= 0).all())
        self.norm = float(values.norm()) if is_finite else math.inf
        if self.norm <= self._limit:
            return norms
        if isinstance(norms, list):
            return [norm * math.inf for norm in norms]
        return norms * math.inf

    def _of_gradients(self, original: Callable[..., Any], **options: Any) -> Any:
        if options:  # asked once more, for clipping
            return original(**options)
        gradients, experts = original()
        self.norm = float(torch.nn.utils.get_total_norm(gradients))
        if not self.norm <= self._limit:  # NaN too
            gradients = [torch.full_like(gradients[0], math.inf)]
        return gradients, experts


class FreedMemory:
    """On a CPU, keeps the memory that an update has freed for the next one.

    Otherwise glibc maps each large tensor anew, which takes a third of an SFT update's time.

    Sequences of unequal lengths leave holes that do not fit the next ones: when the process has
    grown by half since its first update, they are given back.
    """

    def __init__(self) -> None:
        """Sets glibc's allocator; does nothing on a GPU, or with another C library."""
        self._libc: ctypes.CDLL | None = None
        self._max_resident_pages = 0.0  # 0 before the first update
        libc = ctypes.CDLL(None)
        if torch.cuda.is_available() or not hasattr(libc, "mallopt"):
            return
        self._libc = libc
        # M_MMAP_MAX: no mappings of their own; M_TRIM_THRESHOLD: no trimming; M_TOP_PAD: grow by
        # 256 MiB
        for option, value in {-4: 0, -1: -1, -2: 1 << 28}.items():
            libc.mallopt(option, value)

    def after_update(self) -> None:
        """Gives holes back to the system when the process has grown by half."""
        if self._libc is None:
            return
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        if not self._max_resident_pages:
            self._max_resident_pages = 1.5 * resident_pages
        if resident_pages > self._max_resident_pages:
            self._libc.malloc_trim(0)


def join() -> Any:
    """Joins the process group; returns DeepSpeed, with its chatter off."""
    deepspeed = _quiet_deepspeed()
    ranks.join()
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed


def _quiet_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # An operator for inference on CPUs, compiled at every start under a lock that a killed process
    # leaves behind for all who come after.
    communication = importlib.import_module("deepspeed.comm.torch")
    setattr(communication, "build_shm_op", lambda: None)  # noqa: B010 - a module has no such type
    return deepspeed
