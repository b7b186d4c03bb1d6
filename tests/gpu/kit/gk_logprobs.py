"""Times the kernels of grpo/learning/logprob_kernels.py and the same operations in PyTorch.

Prints milliseconds for 2,048 rows of Qwen2.5's vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from grpo.learning import logprob_kernels, token_logprobs
from grpo.learning.token_logprobs import TokenGrads

ROWS = 2048
VOCAB_SIZE = 151_936
REPEATS = 10
TEMPERATURE = 0.7


def milliseconds(work: Callable[[], object]) -> float:
    """Returns the mean time of a call after a warm-up."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / REPEATS


def compare(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(ROWS, VOCAB_SIZE, device="cuda")).to(dtype)
    targets = torch.randint(0, VOCAB_SIZE, (ROWS,), device="cuda")
    token_values = token_logprobs.compute_values(logits, targets, temperature=TEMPERATURE)
    grads = TokenGrads(torch.randn(ROWS, device="cuda"), entropies=None)

    def time_both(values: Callable[..., object], gradient: Callable[..., object]) -> str:
        values_ms = milliseconds(lambda: values(logits, targets, temperature=TEMPERATURE))
        gradient_ms = milliseconds(
            lambda: gradient(logits, targets, token_values, grads, temperature=TEMPERATURE)
        )
        return f"values {values_ms:.2f} ms, gradient {gradient_ms:.2f} ms"

    triton_times = time_both(logprob_kernels.compute_values, logprob_kernels.compute_gradient)
    print(f"{dtype} Triton: {triton_times}", flush=True)
    pytorch_times = time_both(token_logprobs.compute_values, token_logprobs.compute_gradient)
    print(f"{dtype} PyTorch: {pytorch_times}", flush=True)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare(dtype)


if __name__ == "__main__":
    main()
