"""DeepSpeed for the learners: initialization, config, learning rate, gradient-norm limit, memory.

`Learner` and `SupervisedTrainer` share this file.
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

logger = logging.getLogger(__name__)

# A run stops after this many consecutive updates whose loss or gradient norm is not finite, or
# whose gradient norm is above `learner.skip_grad_norm`. Only the gradient norm decides whether an
# update is skipped.
MAX_SKIPPED_UPDATES = 3

# Parameters of glibc's mallopt() (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def init_deepspeed() -> Any:
    """Joins the process group. Returns the module `deepspeed`, with its logging reduced."""
    deepspeed = _import_deepspeed()
    ranks.join_process_group()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    # PyTorch prefers cuDNN's attention on new GPUs. It takes up to 3 s to prepare for each new
    # shape, and every micro-batch has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return deepspeed


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed compiles an operator for inference on CPUs at every start, under a file lock. A
    # killed process does not release the lock, and all later processes would wait for it.
    communication = importlib.import_module("deepspeed.comm.torch")
    setattr(communication, "build_shm_op", lambda: None)  # noqa: B010 - unknown to mypy
    return deepspeed


def use_deterministic_operations() -> None:
    """Makes PyTorch compute the same bits for the same inputs on a GPU, in this process.

    Call it before the first operation on a GPU, because cuBLAS reads its variable once. PyTorch
    raises RuntimeError for an operation that has no deterministic implementation. Does nothing on a
    CPU, whose operations are deterministic anyway.

    Source: PyTorch's notes on reproducibility.
    """
    if not torch.cuda.is_available():
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # It would also fill new tensors with NaN, which costs time and does not change any result.
    # (`setattr`, because mypy does not know the attribute.)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def deepspeed_config(settings: configs.LearnerSettings, dtype: str) -> dict[str, Any]:
    """Returns DeepSpeed's config dictionary.

    Args:
        settings: The config section `learner`.
        dtype: The dtype of the forward pass, `float32` or `bfloat16`.
    """
    optimizer = {
        "lr": settings.lr,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        # torch's fused Adam updates the states in one pass. DeepSpeed's own Adam has to be compiled
        # with nvcc.
        "torch_adam": True,
        "fused": True,
    }
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches varies, so DeepSpeed must not count them: each call of step()
        # ends an update.
        "managed_gradient_accumulation": False,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
    }


def parameter_groups(model: nn.Module, settings: configs.LearnerSettings) -> list[dict[str, Any]]:
    """Returns the optimizer's parameter groups: matrices have weight decay, vectors have none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]  # norms and biases
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(settings: configs.LearnerSettings, update: int, total_updates: int) -> float:
    """Returns the learning rate of an update. It depends on the arguments only.

    The rate rises linearly during the warm-up. Then it is constant, or decays linearly or as a
    cosine from `lr` to `lr * min_lr_ratio`.

    Args:
        settings: The config section `learner`.
        update: The index of the update, from 0.
        total_updates: The number of updates of the run.

    Raises:
        ValueError: `learner.schedule` is unknown.
    """
    if update < settings.warmup_updates:
        return settings.lr * (update + 1) / settings.warmup_updates
    if settings.schedule == "constant":
        return settings.lr
    progress = (update - settings.warmup_updates) / max(1, total_updates - settings.warmup_updates)
    if settings.schedule == "linear":
        decay = 1 - progress
    elif settings.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"unknown learner.schedule {settings.schedule!r}")
    floor = settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * decay)


def skipped_updates_error(
    update: int, loss: float, grad_norm: float, settings: configs.LearnerSettings, num_updates: int
) -> RunError:
    """Returns the error that ends a run after `num_updates` consecutive unusable updates."""
    repetition = f", {num_updates} times in a row" if num_updates > 1 else ""
    return RunError(
        f"update {update}: loss {loss} or gradient norm {grad_norm} is not finite or above "
        f"learner.skip_grad_norm={settings.skip_grad_norm:g}{repetition}. The last checkpoint is "
        "intact: continue from it with --resume and a lower learner.lr. If such gradient norms are "
        "normal for this run, raise learner.skip_grad_norm instead."
    )


def free_deepspeed_engine(deepspeed_engine: Any) -> None:
    """Makes the memory of a DeepSpeed engine collectable.

    The hooks of the ZeRO optimizers refer to the engine from within PyTorch, where Python's garbage
    collector does not see them. A later run in the same process would find the memory in use. With
    ZeRO-3, DeepSpeed keeps the model all the same.
    """
    try:
        deepspeed_engine.destroy()
    except Exception:  # after a failure on a GPU, every call fails; the process is about to end
        logger.debug("DeepSpeed's engine could not be freed", exc_info=True)


def torch_optimizer(deepspeed_engine: Any) -> Any:
    """Returns the torch optimizer of a DeepSpeed engine. The ZeRO optimizers wrap it."""
    optimizer = deepspeed_engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


class NormLimit:
    """Makes DeepSpeed skip an update whose gradient norm is above a limit.

    DeepSpeed's ZeRO optimizers skip an update whose gradient norm is not finite. Each of them has
    its own method for the norm. NormLimit replaces that method by one whose result is infinite if
    the norm is above the limit.

    Attributes:
        norm: The gradient norm of the last update, before clipping. Infinite or NaN if it is not
            finite; infinite before the first update.
    """

    def __init__(self, optimizer: Any, limit: float) -> None:
        """Replaces the method of DeepSpeed's `optimizer` that computes its gradient norm."""
        self.norm = math.inf
        self._limit = limit
        replacements = {
            "_get_norm_groups": self._limit_norms,  # ZeRO-3
            "scaled_global_norm": self._limit_norms,  # ZeRO-1 and 2
            "get_grads_for_norm": self._limit_gradients,  # ZeRO-1 in bfloat16
        }
        for name, replacement in replacements.items():
            original = getattr(optimizer, name, None)
            if original is not None:
                setattr(optimizer, name, functools.partial(replacement, original))

    def _limit_norms(self, original: Callable[..., Any]) -> Any:
        """Returns the result of `original`, one norm or a list, or infinities above the limit."""
        norms = original()
        values = torch.as_tensor(norms)
        # DeepSpeed returns -1 for a norm that is not finite.
        is_finite = bool((values >= 0).all())
        self.norm = float(values.norm()) if is_finite else math.inf
        if self.norm <= self._limit:
            return norms
        if isinstance(norms, list):
            return [norm * math.inf for norm in norms]
        return norms * math.inf

    def _limit_gradients(self, original: Callable[..., Any], **options: Any) -> Any:
        """Returns the gradients of `original`, or an infinite one if their norm is too large."""
        if options:
            # This call serves the clipping. The call for the norm has no options.
            return original(**options)
        gradients, expert_gradients = original()
        self.norm = float(torch.nn.utils.get_total_norm(gradients))
        is_within_limit = self.norm <= self._limit  # False for NaN
        if not is_within_limit:
            gradients = [torch.full_like(gradients[0], math.inf)]
        return gradients, expert_gradients


class HeapReuse:
    """Keeps the memory that an update frees, for the next update. Has an effect on CPUs only.

    By default glibc maps each large tensor anew, which takes a third of the time of an SFT update.

    Sequences of different lengths leave holes in the heap that later tensors do not fit into. When
    the process has grown by half since its first update, the holes are returned to the system.
    """

    def __init__(self) -> None:
        """Configures glibc's allocator. Does nothing on a GPU or with another C library."""
        self._libc: ctypes.CDLL | None = None
        self._max_resident_pages: float | None = None  # set after the first update
        libc = ctypes.CDLL(None)
        if torch.cuda.is_available() or not hasattr(libc, "mallopt"):
            return
        self._libc = libc
        libc.mallopt(M_MMAP_MAX, 0)  # no separate mappings for large allocations
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # no automatic trimming
        libc.mallopt(M_TOP_PAD, 2**28)  # the heap grows by 256 MiB at a time

    def after_update(self) -> None:
        """Returns free memory to the system if the process has grown by half."""
        if self._libc is None:
            return
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        if self._max_resident_pages is None:
            self._max_resident_pages = 1.5 * resident_pages
        if resident_pages > self._max_resident_pages:
            self._libc.malloc_trim(0)
