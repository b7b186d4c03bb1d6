"""Compares vLLM's kernels on this GPU with float32, and times ways to compute attention.

The timed attention is the learner's: the completions of a group over their shared prompt. Takes
seconds and starts no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from vllm.platforms import current_platform

from grpo.learning import packing

HEADS = ((32, 2, 1), (64, 9, 3), (128, 12, 2))  # head size, query heads, key heads
BLOCK = 16  # tokens per block of the KV cache
SEQUENCES = 5
CONTEXT = 160  # tokens per sequence
REPEATS = 5
RMS_SIZE = 1536
SILU_SIZE = 8960


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check_elementwise() -> None:
    x = random(64, RMS_SIZE)
    weight = random(RMS_SIZE)
    out = torch.full_like(x, float("nan"))
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    expected = F.rms_norm(x.float(), (RMS_SIZE,), weight.float(), 1e-6)
    print(f"rms_norm {relative_error(out, expected):.1e}")
    gate_up = random(64, 2 * SILU_SIZE)
    out = torch.full((64, SILU_SIZE), float("nan"), device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, gate_up)
    expected = F.silu(gate_up[:, :SILU_SIZE].float()) * gate_up[:, SILU_SIZE:].float()
    print(f"silu_and_mul {relative_error(out, expected):.1e}")


def check_flash_attention(size: int, query_heads: int, key_heads: int, num_new: int) -> None:
    """Compares FlashAttention 3 over a paged cache with PyTorch in float32.

    The last `num_new` tokens of each sequence attend: 1 as in decoding, more as after a cached
    prefix.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    num_blocks = SEQUENCES * CONTEXT // BLOCK
    key = random(num_blocks, BLOCK, key_heads, size)
    value = random(num_blocks, BLOCK, key_heads, size)
    query = random(SEQUENCES * num_new, query_heads, size)
    block_table = torch.arange(num_blocks, device="cuda", dtype=torch.int32).view(SEQUENCES, -1)
    query_starts = torch.arange(
        0, SEQUENCES * num_new + 1, num_new, device="cuda", dtype=torch.int32
    )
    lengths = torch.full((SEQUENCES,), CONTEXT, device="cuda", dtype=torch.int32)
    actual = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        max_seqlen_q=num_new,
        cu_seqlens_q=query_starts,
        max_seqlen_k=CONTEXT,
        seqused_k=lengths,
        causal=True,
        block_table=block_table,
        softmax_scale=size**-0.5,
        fa_version=3,
    )
    if isinstance(actual, tuple):
        actual = actual[0]

    def contiguous(cache: Tensor) -> Tensor:
        """Returns the cache as [sequences, query heads, context, size] in float32."""
        states = cache.view(SEQUENCES, CONTEXT, key_heads, size).transpose(1, 2).float()
        return states.repeat_interleave(query_heads // key_heads, 1)

    keys = contiguous(key)
    values = contiguous(value)
    mask = torch.ones(num_new, CONTEXT, dtype=torch.bool, device="cuda").tril(CONTEXT - num_new)
    queries = query.view(SEQUENCES, num_new, query_heads, size).transpose(1, 2).float()
    expected = (
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        .transpose(1, 2)
        .reshape(-1, query_heads, size)
    )
    error = relative_error(actual, expected)
    print(f"FlashAttention 3, heads of {size}, {num_new} new tokens: {error:.1e}")


def time_with_gradient(attention: Callable[[], Tensor]) -> str:
    """Returns the time of an attention and its gradient: of the first call and of later calls."""
    milliseconds = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        attention().float().sum().backward()
        torch.cuda.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    first, *later = milliseconds
    return f"first {first:.1f} ms, then {sum(later) / REPEATS:.2f} ms"


def time_learner_attention(completions: int, length: int, prompt_length: int) -> None:
    """Times attention of completions over their prompts, padded and with the varlen kernel.

    Args:
        completions: Number of completions.
        length: Tokens per completion.
        prompt_length: Tokens per prompt.
    """
    size, query_heads, key_heads = HEADS[-1]
    total_length = prompt_length + length
    query = random(completions, query_heads, length, size).requires_grad_()
    key = random(completions, key_heads, total_length, size).requires_grad_()
    value = random(completions, key_heads, total_length, size).requires_grad_()
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    mask = F.pad(causal, (prompt_length, 0), value=True).expand(completions, 1, -1, -1)

    def padded_attention() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    print(f"{completions} completions of {length} tokens, prompts of {prompt_length}:")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            print(f"   padded, {backend.name}: {time_with_gradient(padded_attention)}", flush=True)

    def flat(states: Tensor) -> Tensor:
        """Returns states [N, H, T, D] as [N * T, H, D]."""
        return states.detach().transpose(1, 2).flatten(0, 1).requires_grad_()

    def starts(sequence_length: int) -> Tensor:
        """Returns the index of each sequence's first token, and the number of all tokens."""
        end = completions * sequence_length + 1
        return torch.arange(0, end, sequence_length, device="cuda", dtype=torch.int32)

    flat_query = flat(query)
    flat_key = flat(key)
    flat_value = flat(value)
    query_starts = starts(length)
    key_starts = starts(total_length)
    attention = packing._varlen_attention()

    def varlen_attention() -> Tensor:
        return attention(
            flat_query,
            flat_key,
            flat_value,
            query_starts,
            key_starts,
            length,
            total_length,
            scale=size**-0.5,
        )

    actual = varlen_attention().view(completions, length, query_heads, size).transpose(1, 2)
    print(
        f"   variable length: {time_with_gradient(varlen_attention)}; difference from padded "
        f"{relative_error(actual, padded_attention()):.1e}",
        flush=True,
    )


def main() -> None:
    print(current_platform.device_name, current_platform.get_device_capability())
    current_platform.import_kernels()
    check_elementwise()
    for heads in HEADS:
        for num_new in (1, 100):
            check_flash_attention(*heads, num_new=num_new)
    for shape in ((42, 255, 20), (41, 254, 21)):  # cuDNN makes a new plan for each shape
        time_learner_attention(*shape)


if __name__ == "__main__":
    main()
