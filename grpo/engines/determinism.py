"""The engine's part of `engine.deterministic`: kernels that do not depend on the rest of a batch.

Which sequences vLLM decodes together depends on the time at which requests arrive and end. With
ordinary kernels the size of a batch changes the order of floating point sums, and thereby the last
bits of a logprob. The learner's part is `use_deterministic_operations`
(grpo/learning/deepspeed_setup.py).

Source: vLLM's documentation, "Batch Invariance".
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from grpo.types import UserError

BATCH_INVARIANT_VARIABLE = "VLLM_BATCH_INVARIANT"
KERNELS_FILE = "model_executor/determinism/batch_invariant.py"  # in the package vllm
MIN_CAPABILITY = (8, 0)  # of the GPUs for which vLLM 0.32 has such kernels: Ampere


def require_batch_invariant_kernels() -> None:
    """Raises UserError if vLLM has no batch-invariant kernels for this machine's GPU.

    Does nothing on a CPU.
    """
    if not torch.cuda.is_available():
        return
    spec = importlib.util.find_spec("vllm")  # does not import it
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not any((Path(folder) / KERNELS_FILE).exists() for folder in folders):
        raise UserError(
            "engine.deterministic: this build of vLLM has no batch-invariant kernels. Install vLLM "
            "0.32 (./launch/setup.sh), or set engine.deterministic=false"
        )
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        major, minor = capability
        raise UserError(
            f"engine.deterministic: vLLM has no batch-invariant kernels for "
            f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}; 8.0 is needed). "
            "Set engine.deterministic=false"
        )
