"""Lower bounds for the time of a step on this machine.

The bounds are computed from the measured matrix multiplication rate and memory bandwidth of the
machine. `time / bound` of a phase compares it with the hardware, not with another program.

- A decoding step reads all weights and the KV cache, or computes 2 FLOP per weight and sequence,
  whichever takes longer.
- Training computes 6 FLOP per weight and token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.types import Group

COPIED_BYTES = 2**27  # size of the buffer whose copy measures the memory bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Measured rates of this machine."""

    flops: float  # FLOP/s of matrix products in the dtype of the policy
    bandwidth: float  # bytes/s that a copy reads and writes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a dense model, as far as the bounds need them."""

    num_weights: int  # all weights
    body_weights: int  # weights that multiply every token: without embeddings and head
    num_layers: int
    hidden_size: int
    vocab_size: int
    attention_width: int  # attention heads x head size
    kv_bytes_per_token: int
    bytes_per_weight: int  # in the forward pass

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in the forward pass."""
        return self.num_weights * self.bytes_per_weight


def measure_machine(dtype: str, seconds: float = 0.3) -> Machine:
    """Measures the rates of this machine. No other work may run at the same time.

    Args:
        dtype: `bfloat16` or `float32`, the dtype of the matrix product.
        seconds: Duration of each measurement. The fastest repetition counts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    b = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    product_s = _fastest(lambda: a @ b, device, seconds)
    copy_s = _fastest(lambda: target.copy_(source), device, seconds)
    return Machine(flops=2 * size**3 / product_s, bandwidth=2 * COPIED_BYTES / copy_s)


def _fastest(operation: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Returns the seconds of the fastest call of `operation`, repeated for `seconds`."""
    best = float("inf")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def model_shape(model_dir: Path, num_weights: int, dtype: str) -> ModelShape:
    """Returns the sizes of a dense model from its config.json.

    Args:
        model_dir: Hugging Face model directory.
        num_weights: Number of weights of the model.
        dtype: `bfloat16` or `float32`, the dtype of the forward pass.
    """
    config = json.loads((model_dir / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    embedding_weights = config["vocab_size"] * config["hidden_size"]
    num_embeddings = 1 if config.get("tie_word_embeddings", False) else 2
    bytes_per_weight = 2 if dtype == "bfloat16" else 4
    kv_values = 2 * config["num_hidden_layers"] * num_kv_heads * head_size
    return ModelShape(
        num_weights=num_weights,
        body_weights=num_weights - embedding_weights * num_embeddings,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        attention_width=num_heads * head_size,
        kv_bytes_per_token=kv_values * bytes_per_weight,
        bytes_per_weight=bytes_per_weight,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The rates of a machine and the sizes of a model, which together bound the time of a step."""

    machine: Machine
    shape: ModelShape

    def bounds(
        self, groups: Sequence[Group], *, updates: int, reference: bool, ranks: int = 1
    ) -> dict[str, float]:
        """Returns lower bounds for a step, in seconds: `rollout`, `update` and `sync`.

        Prompts count once per group.

        Args:
            groups: The sampled groups.
            updates: Number of optimizer updates; with 0 the bound of `update` is 0.
            reference: Whether a reference model computes logprobs.
            ranks: Number of ranks that share rollout and update.
        """
        machine = self.machine
        prompt_lengths = [len(group.prompt_ids) for group in groups]
        lengths: list[tuple[int, int]] = []  # prompt and completion tokens of each sequence
        for group, prompt_length in zip(groups, prompt_lengths, strict=True):
            for completion in group.completions:
                lengths.append((prompt_length, len(completion.token_ids)))
        prefill_s = 2 * self.shape.body_weights * sum(prompt_lengths) / machine.flops
        rollout_s = (prefill_s + self._decode_seconds(lengths)) / ranks
        update_s = 0.0
        if updates:
            # the backward pass costs two forward passes; old and reference logprobs cost one each
            num_forwards = 3
            if updates > 1:
                num_forwards += 1
            if reference:
                num_forwards += 1
            forwards_s = num_forwards * self._forward_flop(prompt_lengths, lengths) / machine.flops
            # Adam reads gradient, master weight and two moments, writes the last three, all in
            # float32, and writes the bfloat16 weight.
            adam_bytes_per_weight = 30
            adam_bytes = updates * adam_bytes_per_weight * self.shape.num_weights
            adam_s = adam_bytes / machine.bandwidth
            update_s = (forwards_s + adam_s) / ranks
        sync_s = 2 * self.shape.weight_bytes / machine.bandwidth  # read once, written once
        return {"rollout": rollout_s, "update": update_s, "sync": sync_s}

    def _forward_flop(
        self, prompt_lengths: Sequence[int], lengths: Sequence[tuple[int, int]]
    ) -> int:
        """Returns the FLOP of one forward pass over the prompts and their completions."""
        model = self.shape
        num_completion_tokens = sum(length for _, length in lengths)
        num_tokens = sum(prompt_lengths) + num_completion_tokens
        # Pairs of tokens. Causal attention computes half of them, with 4 FLOP per pair and width.
        num_pairs = sum(prompt_length**2 for prompt_length in prompt_lengths)
        num_pairs += sum((prompt + length) ** 2 - prompt**2 for prompt, length in lengths)
        linear = model.body_weights * num_tokens + model.head_weights * num_completion_tokens
        return 2 * linear + 2 * model.num_layers * model.attention_width * num_pairs

    def _decode_seconds(self, lengths: Sequence[tuple[int, int]]) -> float:
        """Returns the lower bound for decoding sequences of (prompt, completion) tokens.

        A step reads the weights and the KV cache of the unfinished sequences, or computes their
        matrix products, whichever takes longer.
        """
        model = self.shape
        shortest_first = sorted(lengths, key=lambda pair: pair[1])
        num_active = len(lengths)
        num_finished = 0
        cached_tokens = sum(prompt for prompt, _ in lengths)
        seconds = 0.0
        for step in range(shortest_first[-1][1]):
            while shortest_first[num_finished][1] <= step:
                num_active -= 1
                cached_tokens -= shortest_first[num_finished][0] + step
                num_finished += 1
            read_bytes = model.weight_bytes + model.kv_bytes_per_token * cached_tokens
            flop = 2 * (model.body_weights + model.head_weights) * num_active
            seconds += max(read_bytes / self.machine.bandwidth, flop / self.machine.flops)
            cached_tokens += num_active
        return seconds
