"""The Triton kernels on a CPU.

Computed by Triton's interpreter, and compiled for a GPU that is not there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.learning import policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def compare(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Asserts that values and gradients are those of PyTorch's own operations."""
    from grpo.learning import logprob_kernels

    generator = torch.Generator().manual_seed(rows)
    logits = (5 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    grad, entropy_grad = torch.randn(2, rows, generator=generator)
    expected = policy._values(logits, targets, temperature=0.7)
    for one, other in zip(
        logprob_kernels.values(logits, targets, temperature=0.7), expected, strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)
    for wanted in (None, entropy_grad):
        arguments = (logits, targets, expected[2], expected[1], grad, wanted)
        gradient = logprob_kernels.gradient(*arguments, temperature=0.7)
        exact = policy._gradient(logits.float(), *arguments[1:], temperature=0.7)
        relative = 1e-4 if dtype == torch.float32 else 2**-7  # bfloat16 rounds the result
        assert gradient.dtype == dtype
        assert torch.allclose(gradient.float(), exact, rtol=relative, atol=1e-7)


def compare_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, vocabulary in ((3, 5000), (2, 4096), (4, 37), (0, 100)):
            compare(rows, vocabulary, dtype)


def test_values_and_gradients_are_those_of_pytorchs_operations():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [
        sys.executable,
        "-c",
        "import test_logprob_kernels; test_logprob_kernels.compare_all()",
    ]
    subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent, check=True
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_hopper_gpu(dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from grpo.learning import logprob_kernels

    logits, floats, numbers = f"*{dtype}", "*fp32", "i32"
    values = {
        "logits": logits,
        "targets": "*i64",
        "logprobs": floats,
        "entropies": floats,
        "normalisers": floats,
    }
    values |= {
        "row_stride": numbers,
        "vocab_size": numbers,
        "temperature": "fp32",
        "lowest": "fp32",
        "block": "constexpr",
    }
    gradient = {
        "logits": logits,
        "targets": "*i64",
        "normalisers": floats,
        "entropies": floats,
        "logprob_grads": floats,
        "entropy_grads": floats,
    }
    gradient |= {
        "logits_grad": logits,
        "row_stride": numbers,
        "grad_row_stride": numbers,
        "vocab_size": numbers,
        "temperature": "fp32",
    }
    gradient |= {"with_entropy": "constexpr", "block": "constexpr"}
    kernels = [(logprob_kernels._values, values, {})]
    kernels += [
        (logprob_kernels._gradient, gradient, {"with_entropy": with_entropy})
        for with_entropy in (False, True)
    ]
    for kernel, signature, constants in kernels:
        source = ASTSource(
            kernel, signature=signature, constexprs=constants | {"block": logprob_kernels.BLOCK}
        )
        assert triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
        ).asm["cubin"]
