#!/usr/bin/env bash
# Prints facts about this machine: GPU, driver, processors, memory, disk space, compilers, versions.
nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv,noheader
nproc
free -g | sed -n 2p
df -h /tmp /dev/shm | tail -2
which gcc g++ nvcc ninja ptxas | tr '\n' ' '
python3 - <<'PYTHON'
import importlib.metadata
import sys

import torch

print("python", sys.version.split()[0])
for name in ("torch", "triton", "transformers", "vllm", "deepspeed", "trl", "numpy", "accelerate"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
PYTHON
