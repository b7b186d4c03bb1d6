"""What the CPU of this machine lacks: instructions without which a dtype is slow or impossible.

- bfloat16: without AVX-512, PyTorch has no fast matrix product. Measured on an AMD EPYC with AVX2,
  2 cores: 0.7 GFLOP/s, and 67 in float32.
- int4: vLLM's build for CPUs without AVX-512 does not contain the kernel `cpu_gemm_wna16`.
- int8: without VNNI instructions, oneDNN adds pairs of products in 16 bits, which saturate. The
  products of a layer are then wrong, without an error (oneDNN's documentation, "Nuances of int8
  Computations"; measured with vLLM 0.32).

Nothing is missing on a GPU, or on a CPU of another architecture than x86.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from grpo.types import UserError

VNNI = ("avx512_vnni", "avx_vnni")


def bfloat16_warning() -> str | None:
    """Returns why bfloat16 is slow on this machine, None if it is not."""
    if not _lacks_avx512():
        return None
    return "this CPU has no AVX-512, without which bfloat16 is many times slower than float32"


def int4_obstacle() -> str | None:
    """Returns why vLLM cannot run int4 models on this machine, None if it can."""
    if not _lacks_avx512():
        return None
    return "this CPU has no AVX-512, and vLLM has no int4 kernel without it"


def int8_warning() -> str | None:
    """Returns why int8 models are less accurate on this machine, None if they are not."""
    capabilities = _x86_capabilities()
    if capabilities is None or any(capabilities[name] for name in VNNI):
        return None
    return (
        "this CPU has no VNNI instructions, and int8 products saturate without them: the model is "
        "less accurate here than on a GPU or on another CPU"
    )


def require_kernels(weight_bits: int | None, say: Callable[[str], None]) -> None:
    """Checks that this machine can run a quantized model.

    Args:
        weight_bits: Bits per weight of the model, None for a model that is not quantized.
        say: Receives a line if the model is less accurate on this machine.

    Raises:
        UserError: vLLM has no kernel for the model.
    """
    if weight_bits == 4:
        obstacle = int4_obstacle()
        if obstacle is not None:
            raise UserError(f"the model has int4 weights, but {obstacle}: use another machine")
    if weight_bits == 8:
        warning = int8_warning()
        if warning is not None:
            say(f"int8: {warning}")


def _lacks_avx512() -> bool:
    capabilities = _x86_capabilities()
    return capabilities is not None and not capabilities["avx512_f"]


def _x86_capabilities() -> Mapping[str, Any] | None:
    """Returns what PyTorch reports about the CPU; None on a GPU or another architecture."""
    if torch.cuda.device_count() > 0:  # does not initialise CUDA
        return None
    capabilities = torch.cpu.get_capabilities()
    return capabilities if capabilities["architecture"] == "x86_64" else None
