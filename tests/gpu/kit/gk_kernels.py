"""vLLM's kernels on this GPU against float32, and ways to compute the learner's attention.

Seconds; no engine.
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
BLOCK, SEQUENCES, CONTEXT = 16, 5, 160
REPEATS = 5


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check_elementwise() -> None:
    x, weight = random(64, 1536), random(1536)
    out = torch.full_like(x, float("nan"))
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    print(f"rms_norm {relative(out, F.rms_norm(x.float(), (1536,), weight.float(), 1e-6)):.1e}")
    gate_up = random(64, 2 * 8960)
    out = torch.full((64, 8960), float("nan"), device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, gate_up)
    print(
        "silu_and_mul "
        f"{relative(out, F.silu(gate_up[:, :8960].float()) * gate_up[:, 8960:].float()):.1e}"
    )


def check_flash_attention(size: int, query_heads: int, key_heads: int, new: int) -> None:
    """`new` tokens of each sequence attend to a paged cache.

    1 as in decoding, more as after a cached prefix.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    key, value = (random(SEQUENCES * CONTEXT // BLOCK, BLOCK, key_heads, size) for _ in range(2))
    query = random(SEQUENCES * new, query_heads, size)
    blocks = torch.arange(SEQUENCES * CONTEXT // BLOCK, device="cuda", dtype=torch.int32).view(
        SEQUENCES, -1
    )
    starts = torch.arange(0, SEQUENCES * new + 1, new, device="cuda", dtype=torch.int32)
    lengths = torch.full((SEQUENCES,), CONTEXT, device="cuda", dtype=torch.int32)
    found = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        max_seqlen_q=new,
        cu_seqlens_q=starts,
        max_seqlen_k=CONTEXT,
        seqused_k=lengths,
        causal=True,
        block_table=blocks,
        softmax_scale=size**-0.5,
        fa_version=3,
    )

    def whole(cache):
        return cache.view(SEQUENCES, CONTEXT, key_heads, size).transpose(1, 2).float()

    keys, values = (
        whole(cache).repeat_interleave(query_heads // key_heads, 1) for cache in (key, value)
    )
    mask = torch.ones(new, CONTEXT, dtype=torch.bool, device="cuda").tril(CONTEXT - new)
    queries = query.view(SEQUENCES, new, query_heads, size).transpose(1, 2).float()
    expected = (
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        .transpose(1, 2)
        .reshape(-1, query_heads, size)
    )
    found = found[0] if isinstance(found, tuple) else found
    print(f"FlashAttention 3, heads of {size}, {new} new tokens: {relative(found, expected):.1e}")


def seconds_of(attention: Callable[[], Tensor]) -> str:
    """Returns how long the attention and its gradient take: the first time, and after that."""
    times = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        attention().float().sum().backward()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return f"first {times[0]:.1f} ms, then {sum(times[1:]) / REPEATS:.2f} ms"


def time_learner_attention(completions: int, depth: int, prompt: int) -> None:
    """Completions of `depth` tokens over their prompts, as padded rows and as the variable-length
    kernel takes them.
    """
    size, query_heads, key_heads = HEADS[-1]
    query = random(completions, query_heads, depth, size).requires_grad_()
    key, value = (
        random(completions, key_heads, prompt + depth, size).requires_grad_() for _ in range(2)
    )
    causal = torch.ones(depth, depth, dtype=torch.bool, device="cuda").tril()
    mask = F.pad(causal, (prompt, 0), value=True).expand(completions, 1, -1, -1)
    print(f"{completions} completions of {depth} tokens, prompts of {prompt}:")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):

            def padded():
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, enable_gqa=True
                )

            print(f"   padded, {backend.name}: {seconds_of(padded)}", flush=True)

    def flat(states):
        return states.detach().transpose(1, 2).flatten(0, 1).requires_grad_()

    queries, keys, values = flat(query), flat(key), flat(value)
    query_starts, key_starts = (
        torch.arange(0, completions * length + 1, length, device="cuda", dtype=torch.int32)
        for length in (depth, prompt + depth)
    )
    attention = packing._varlen_attention()

    def spans():
        return attention(
            queries, keys, values, query_starts, key_starts, depth, prompt + depth, scale=size**-0.5
        )

    found = spans().view(completions, depth, query_heads, size).transpose(1, 2)
    print(
        f"   variable length: {seconds_of(spans)}; against the padded "
        f"{relative(found, padded()):.1e}",
        flush=True,
    )


def main() -> None:
    print(current_platform.device_name, current_platform.get_device_capability())
    current_platform.import_kernels()
    check_elementwise()
    for heads in HEADS:
        for new in (1, 100):
            check_flash_attention(*heads, new=new)
    for shape in ((42, 255, 20), (41, 254, 21)):  # two shapes: cuDNN plans anew for each
        time_learner_attention(*shape)


if __name__ == "__main__":
    main()
