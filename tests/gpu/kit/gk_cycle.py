"""tests/benchmarks/gpu_cycle.py in parts, with a model and logs that stay.

    gk_cycle.py ours|trl [--small] [key=value ...]

The engine's child prints the seconds of each of its calls into engine.log (gk_child.py).
GK_PROFILE=1: a profile of the third update.
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

HERE = Path(__file__).resolve().parent
BENCHMARKS = Path("tests/benchmarks").resolve()  # of the checkout that the scripts are run in
sys.path[:0] = [str(BENCHMARKS), str(HERE)]

import gpu_cycle  # noqa: E402
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from grpo.engines.local.engine import VllmEngine  # noqa: E402
from grpo.learning.learner import Learner  # noqa: E402
from grpo.tools import bench  # noqa: E402

PROFILED_UPDATE = 3
CUDA = torch.cuda.is_available()


def keep_logs() -> None:
    """Makes the benchmark leave its run directory, with engine.log, behind."""

    def kept(prefix):
        return contextlib.nullcontext(tempfile.mkdtemp(prefix=prefix))

    bench.tempfile = types.SimpleNamespace(TemporaryDirectory=kept)  # type: ignore[assignment]


def time_the_child() -> None:
    """Starts gk_child.py in place of the engine's own child."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    )
    VllmEngine.child_module = "gk_child"


def profile_an_update() -> None:
    plain: Callable[..., dict[str, float]] = Learner.update
    calls = 0

    def update(self: Learner, *arguments: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls != PROFILED_UPDATE:
            return plain(self, *arguments)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as traced:
            report = plain(self, *arguments)
            if CUDA:
                torch.cuda.synchronize()
        key = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
        print(traced.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=80))
        return report

    Learner.update = update  # type: ignore[method-assign]


def main(part: str, words: list[str]) -> None:
    small = "--small" in words
    tokens = 16 if small else 256
    folder = Path(tempfile.gettempdir(), "gk-cycle")
    folder.mkdir(exist_ok=True)
    model_dir = folder / "model"
    if not model_dir.exists():
        begun = time.monotonic()
        gpu_cycle.write_model(model_dir, small=small)
        print(f"model written in {time.monotonic() - begun:.1f} s", flush=True)
    if part == "trl":
        gpu_cycle.trl(model_dir, folder / "trl", tokens)
    else:
        keep_logs()
        time_the_child()
        if os.environ.get("GK_PROFILE"):
            profile_an_update()
        gpu_cycle.ours(model_dir, folder, tokens, [word for word in words if "=" in word])
    if CUDA:
        reserved, allocated = (
            torch.cuda.max_memory_reserved() / 2**30,
            torch.cuda.max_memory_allocated() / 2**30,
        )
        print(
            f"GPU memory of this process at most: {reserved:.1f} GiB reserved, {allocated:.1f} "
            "GiB allocated"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
