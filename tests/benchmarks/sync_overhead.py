"""Times the Python part of a weight sync: what 338 tensors cost, whatever their size.

    .venv/bin/python tests/benchmarks/sync_overhead.py

The model has the 28 layers of Qwen2.5-1.5B and a width of 64, so that copying takes no time. vLLM's
model does not pack its weights here, as on a GPU. Figures in docs/benchmarks.md, "On a GPU".
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo.engines.transfer.checksums import ArrivalCheck, WeightStream
from grpo.learning import models
from grpo.run.addresses import use_loopback
from grpo.stages.engine import ModelWeights

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "dtype": "bfloat16",
}
REPEATS = 20


def create_vllm_model(model_dir: Path, rendezvous_file: Path) -> Any:
    """Returns vLLM's model in the layout in which it receives weights on a GPU."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(
        model=str(model_dir),
        dtype="bfloat16",
        load_format="dummy",
        enforce_eager=True,
        max_model_len=64,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous_file}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        return initialize_model(config)


def pack(named_tensors: list[tuple[str, torch.Tensor]], buffer: torch.Tensor) -> None:
    """Copies the tensors into a buffer one after another, as vLLM's IPC sender does."""
    start = 0
    for _, tensor in named_tensors:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[start : start + flat.numel()].copy_(flat)
        start += flat.numel()


def milliseconds(work: Callable[[], object]) -> float:
    """Returns the median time of a call."""
    durations = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return 1e3 * statistics.median(durations)


def main() -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    use_loopback()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="grpo-sync-") as folder:
        model_dir = Path(folder, "model")
        models.make_tiny("tiny-qwen2", model_dir, 0, **SHAPE)
        vllm_model = create_vllm_model(model_dir, Path(folder, "rendezvous"))
        policy = models.load_model(model_dir, "eager").to(torch.bfloat16)
    weights = ModelWeights(policy)
    named_tensors = list(WeightStream(weights, torch.bfloat16))
    buffer = torch.empty(sum(tensor.nbytes for _, tensor in named_tensors), dtype=torch.uint8)
    print(f"{len(named_tensors) - 1} tensors, medians of {REPEATS}")
    parts: dict[str, Callable[[], object]] = {
        "sender: tensors and checksums": lambda: list(WeightStream(weights, torch.bfloat16)),
        "sender: packing": lambda: pack(named_tensors, buffer),
        "receiver: loading by vLLM": lambda: vllm_model.load_weights(named_tensors[:-1]),
        "receiver: loading and checksums": lambda: ArrivalCheck(vllm_model).load_weights(
            named_tensors
        ),
    }
    for name, work in parts.items():
        print(f"{name:32} {milliseconds(work):5.1f} ms")


if __name__ == "__main__":
    main()
