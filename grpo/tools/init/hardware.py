"""The machine that a config is written for: found on this machine, or described by the user."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import psutil
import torch

from grpo.metrics.memory import GB
from grpo.types import UserError

DEFAULT_GPU_GB = 80.0  # as in `grpo doctor --gpus`
MIB_PER_GB = 1024
MAX_GPU_GB = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine that a config is written for. Memory is in GiB.

    Example: `Hardware(num_gpus=8, memory_gb=80.0, is_described=True)`.

    Attributes:
        num_gpus: Number of GPUs; 0 for a machine that trains on its CPU.
        memory_gb: Memory of each GPU; without GPUs, the free main memory.
        main_memory_gb: Main memory of a machine with GPUs; None if it is unknown.
        num_cores: Number of CPU cores, without GPUs.
        is_described: Whether the user has described the machine, which may be another one.
    """

    num_gpus: int
    memory_gb: float
    main_memory_gb: float | None = None
    num_cores: int = 1
    is_described: bool = False

    def __str__(self) -> str:
        """Returns the machine in words, e.g. "8 GPUs with 80 GB each"."""
        if self.num_gpus == 0:
            cores = "1 CPU core" if self.num_cores == 1 else f"{self.num_cores} CPU cores"
            return f"{cores} and {self.memory_gb:.0f} GB of free memory"
        if self.num_gpus == 1:
            return f"one GPU with {self.memory_gb:.0f} GB"
        return f"{self.num_gpus} GPUs with {self.memory_gb:.0f} GB each"


def choose_hardware(num_gpus: int | None, gpu_gb: float | None) -> Hardware:
    """Returns the machine that `--gpus` and `--gpu-gb` describe, or without them this machine.

    Args:
        num_gpus: Number of GPUs. Default: those of this machine, or 1.
        gpu_gb: Memory of a GPU in GiB. Default: that of this machine's GPUs, or 80.

    Raises:
        UserError: An option is out of range, or the memory of the GPUs cannot be found.
    """
    if num_gpus is not None and num_gpus < 1:
        raise UserError(f"--gpus {num_gpus}: expected a number of GPUs from 1")
    if gpu_gb is not None and not 0 < gpu_gb < MAX_GPU_GB:
        raise UserError(f"--gpu-gb {gpu_gb:g}: expected the memory of a GPU in GB, e.g. 80")
    num_found = torch.cuda.device_count()  # does not initialise CUDA
    if num_gpus is None and gpu_gb is None:
        return _this_machine(num_found)
    if num_gpus is None:
        num_gpus = max(1, num_found)
    if gpu_gb is None:
        gpu_gb = _gpu_gb() if num_found else DEFAULT_GPU_GB
    return Hardware(num_gpus=num_gpus, memory_gb=gpu_gb, is_described=True)


def _this_machine(num_gpus: int) -> Hardware:
    memory = psutil.virtual_memory()
    if num_gpus == 0:
        num_cores = len(os.sched_getaffinity(0))
        return Hardware(num_gpus=0, memory_gb=memory.available / GB, num_cores=num_cores)
    return Hardware(num_gpus=num_gpus, memory_gb=_gpu_gb(), main_memory_gb=memory.total / GB)


def _gpu_gb() -> float:
    """Returns the memory of the smallest GPU of this machine in GiB.

    nvidia-smi is asked, because PyTorch would create a CUDA context, which takes GPU memory.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return min(float(line) for line in output.splitlines()) / MIB_PER_GB
    except (OSError, subprocess.CalledProcessError, ValueError):
        raise UserError(
            "the memory of the GPUs cannot be read from nvidia-smi: set --gpu-gb, e.g. --gpu-gb 80"
        ) from None
