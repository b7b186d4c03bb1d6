"""Runs a part of tests/benchmarks/gpu_cycle.py; keeps the model and the logs.

    gk_cycle.py ours|trl [--small] [key=value ...]

PYTHONPATH must contain tests/benchmarks and the folder of this file, also for the engine's process.
Prints the seconds of each call to the engine; the engine's child process prints its own seconds and
a profile to engine.log (gk_child.py). With GK_PROFILE=1 the third update is profiled.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cycle
import torch
from torch.profiler import ProfilerActivity, profile

from grpo.engines.local.engine import VllmEngine
from grpo.learning.learner import Learner
from grpo.tools import bench

PROFILED_UPDATE = 3
CUDA = torch.cuda.is_available()


def keep_logs() -> None:
    """Prevents `grpo bench` from deleting its run directory, which contains engine.log."""

    def kept_directory(prefix):
        return contextlib.nullcontext(tempfile.mkdtemp(prefix=prefix))

    replacement = types.SimpleNamespace(TemporaryDirectory=kept_directory)
    bench.tempfile = replacement  # type: ignore[assignment]


def time_the_engine() -> None:
    """Makes engines start gk_child.py as their child process, and times their calls to it."""
    VllmEngine.child_module = "gk_child"
    original_call: Callable[..., Any] = VllmEngine._call

    def timed_call(self: VllmEngine, method: str, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = original_call(self, method, *arguments)
        print(f"CALLED {method}: {time.perf_counter() - start:.4f} s", flush=True)
        return result

    VllmEngine._call = timed_call  # type: ignore[method-assign]


def profile_an_update() -> None:
    """Profiles update number PROFILED_UPDATE and prints the operations that take longest."""
    original_update: Callable[..., dict[str, float]] = Learner.update
    num_updates = 0

    def update(self: Learner, *arguments: Any) -> dict[str, float]:
        nonlocal num_updates
        num_updates += 1
        if num_updates != PROFILED_UPDATE:
            return original_update(self, *arguments)
        activities = [ProfilerActivity.CPU]
        sort_key = "self_cpu_time_total"
        if CUDA:
            activities.append(ProfilerActivity.CUDA)
            sort_key = "self_cuda_time_total"
        with profile(activities=activities) as profiler:
            metrics = original_update(self, *arguments)
            if CUDA:
                torch.cuda.synchronize()
        averages = profiler.key_averages()
        print(averages.table(sort_by=sort_key, row_limit=45, max_name_column_width=80))
        return metrics

    Learner.update = update  # type: ignore[method-assign]


def main(part: str, arguments: list[str]) -> None:
    small = "--small" in arguments
    max_tokens = gpu_cycle.SMALL_MAX_TOKENS if small else gpu_cycle.MAX_TOKENS
    folder = Path(tempfile.gettempdir(), "gk-cycle")
    folder.mkdir(exist_ok=True)
    model_dir = folder / "model"
    if not model_dir.exists():
        start = time.monotonic()
        gpu_cycle.write_model(model_dir, small=small)
        print(f"model written in {time.monotonic() - start:.1f} s", flush=True)
    if part == "trl":
        gpu_cycle.time_trl(model_dir, folder / "trl", max_tokens)
    else:
        keep_logs()
        time_the_engine()
        if os.environ.get("GK_PROFILE"):
            profile_an_update()
        overrides = [word for word in arguments if "=" in word]
        gpu_cycle.time_grpo(model_dir, folder, max_tokens, overrides)
    if CUDA:
        reserved_gib = torch.cuda.max_memory_reserved() / 2**30
        allocated_gib = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"maximum GPU memory of this process: {reserved_gib:.1f} GiB reserved, "
            f"{allocated_gib:.1f} GiB allocated"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
