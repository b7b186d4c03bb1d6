"""Tests of the Triton kernels on a CPU.

Triton's interpreter runs them. Triton's compiler compiles them for a GPU, which does not have to be
installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.learning import token_logprobs
from grpo.learning.token_logprobs import TokenGrads

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def check_values_and_gradients(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Asserts that the kernels' values and gradients are those of PyTorch's operations."""
    from grpo.learning import logprob_kernels

    generator = torch.Generator().manual_seed(num_rows)
    logits = (5 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    logprob_grads, entropy_grads = torch.randn(2, num_rows, generator=generator)

    expected_values = token_logprobs.compute_values(logits, targets, temperature=0.7)
    values = logprob_kernels.compute_values(logits, targets, temperature=0.7)
    for actual, expected in zip(values, expected_values, strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)

    # In bfloat16, the kernels round their result.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7
    for optional_entropy_grads in (None, entropy_grads):
        grads = TokenGrads(logprob_grads, optional_entropy_grads)
        arguments = (targets, expected_values, grads)
        gradient = logprob_kernels.compute_gradient(logits, *arguments, temperature=0.7)
        expected_gradient = token_logprobs.compute_gradient(
            logits.float(), *arguments, temperature=0.7
        )
        assert gradient.dtype == dtype
        assert torch.allclose(gradient.float(), expected_gradient, rtol=tolerance, atol=1e-7)


def check_all_shapes_and_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows, vocab_size in ((3, 5000), (2, 4096), (4, 37), (0, 100)):
            check_values_and_gradients(num_rows, vocab_size, dtype)


def test_values_and_gradients_are_those_of_pytorchs_operations():
    """Runs in a subprocess, because Triton reads TRITON_INTERPRET when it is imported."""
    program = "import test_logprob_kernels; test_logprob_kernels.check_all_shapes_and_dtypes()"
    environment = dict(os.environ)
    environment["TRITON_INTERPRET"] = "1"
    subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=Path(__file__).parent, check=True
    )


def compile_for_hopper(kernel, signature, constants):
    """Returns the machine code of a kernel for an H100 (compute capability 9.0, warps of 32)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_hopper_gpu(dtype):
    from grpo.learning import logprob_kernels

    values_signature = {
        "logits": f"*{dtype}",
        "targets": "*i64",
        "logprobs": "*fp32",
        "entropies": "*fp32",
        "normalizers": "*fp32",
        "row_stride": "i32",
        "vocab_size": "i32",
        "temperature": "fp32",
        "lowest": "fp32",
        "block": "constexpr",
    }
    gradient_signature = {
        "logits": f"*{dtype}",
        "targets": "*i64",
        "normalizers": "*fp32",
        "entropies": "*fp32",
        "logprob_grads": "*fp32",
        "entropy_grads": "*fp32",
        "logits_grad": f"*{dtype}",
        "row_stride": "i32",
        "grad_row_stride": "i32",
        "vocab_size": "i32",
        "temperature": "fp32",
        "with_entropy": "constexpr",
        "block": "constexpr",
    }
    block = logprob_kernels.BLOCK
    assert compile_for_hopper(logprob_kernels._values, values_signature, {"block": block})
    for with_entropy in (False, True):
        constants = {"with_entropy": with_entropy, "block": block}
        assert compile_for_hopper(logprob_kernels._gradient, gradient_signature, constants)
