"""The least time of a rollout, an update and a sync on this machine, and the memory they need.

The times follow from the machine's measured matrix rate and memory bandwidth. The memory is that of
learner and engine.

`time / bound` says how far a phase is from the machine, not from another program. Formulas: a
decode step reads all weights and the KV cache, or computes 2 FLOP per weight and sequence,
whichever is longer; training computes 6 FLOP per weight and token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config
from grpo.types import Group

GB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine's measured rates: matrix products in FLOP/s, memory in bytes/s."""

    flops: float  # matrix products in the policy's dtype, FLOP/s
    bandwidth: float  # bytes/s read and written by a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model the bounds need; `body` and `head` are weights that multiply each token."""

    weights: int  # all of them
    body: int  # without embeddings and head
    head: int
    layers: int
    width: int  # attention heads x head size
    kv_bytes: int  # of one token
    weight_bytes: int  # of one weight, in the forward pass


def measure(dtype: str, seconds: float = 0.3) -> Machine:
    """Returns this machine's rates, the best of a few repetitions within about `seconds` each.

    Nothing else may run meanwhile.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.empty(2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return Machine(
        flops=2 * size**3 / _best(lambda: a @ b, device, seconds),
        bandwidth=2 * 2**27 / _best(lambda: target.copy_(source), device, seconds),
    )


def _best(work: object, device: torch.device, seconds: float) -> float:
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def shape(model_dir: Path, num_weights: int, dtype: str) -> Shape:
    """Returns the shape of a dense model from its config.json."""
    config = json.loads((model_dir / "config.json").read_text())
    heads, embeddings = config["num_attention_heads"], config["vocab_size"] * config["hidden_size"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tied, bytes_ = config.get("tie_word_embeddings", False), 2 if dtype == "bfloat16" else 4
    return Shape(
        weights=num_weights,
        body=num_weights - embeddings * (1 if tied else 2),
        head=embeddings,
        layers=config["num_hidden_layers"],
        width=heads * size,
        kv_bytes=2
        * config["num_hidden_layers"]
        * (config.get("num_key_value_heads") or heads)
        * size
        * bytes_,
        weight_bytes=bytes_,
    )


def bounds(
    machine: Machine,
    model: Shape,
    groups: Sequence[Group],
    *,
    updates: int,
    reference: bool,
    ranks: int = 1,
) -> dict[str, float]:
    """Returns the least seconds of `rollout`, `update` and `sync` for what was sampled.

    Prompts count once per group, completions as long as they are. Rollout and update are shared
    among `ranks`.
    """
    prompts = [len(group.prompt_ids) for group in groups]
    rows = [
        (len(group.prompt_ids), len(c.token_ids)) for group in groups for c in group.completions
    ]
    tokens = sum(length for _, length in rows)
    attention = sum(prompt**2 for prompt in prompts) + sum(
        (prompt + length) ** 2 - prompt**2 for prompt, length in rows
    )
    forward = (
        2 * (model.body * (sum(prompts) + tokens) + model.head * tokens)
        + 2 * model.layers * model.width * attention
    )
    # backward is two; old and reference logprobs one each
    forwards = 3 + (1 if updates > 1 else 0) + (1 if reference else 0)
    copied = model.weights * model.weight_bytes
    return {
        "rollout": (2 * model.body * sum(prompts) / machine.flops + _decode(machine, model, rows))
        / ranks,
        "update": (
            forwards * forward / machine.flops + updates * 30 * model.weights / machine.bandwidth
        )
        / ranks
        if updates
        else 0.0,
        "sync": 2 * copied / machine.bandwidth,
    }


def _decode(machine: Machine, model: Shape, rows: Sequence[tuple[int, int]]) -> float:
    """Returns the least seconds of decoding completions; `rows`: tokens of prompt and completion.

    Step t reads the weights and the cache of the sequences that are not done, or computes for them,
    whichever is longer.
    """
    ordered = sorted(rows, key=lambda row: row[1])
    active, context, done, seconds = len(rows), sum(prompt for prompt, _ in rows), 0, 0.0
    for t in range(ordered[-1][1]):
        while ordered[done][1] <= t:
            active, context, done = active - 1, context - ordered[done][0] - t, done + 1
        read = model.weights * model.weight_bytes + model.kv_bytes * context
        seconds += max(
            read / machine.bandwidth, 2 * (model.body + model.head) * active / machine.flops
        )
        context += active
    return seconds


def memory(
    config: Any,
    shape: Shape,
    hidden: int,
    vocabulary: int,
    ranks: int = 1,
    reference: int | None = None,
) -> dict[str, float]:
    """Returns the bytes that one of `ranks` learners of a stage holds, by part.

    They are those at the longest sequences. `reference`: how many weights the teacher has. The
    values are estimates, within a third of what is measured.

    Mixed-precision Adam: 2 + 4 + 4 + 8 bytes per weight (ZeRO 1910.02054 section 3.1, float32
    gradients); activations 34 bytes per token, hidden unit and layer without checkpointing
    (2205.05198 Eq. 2, without its attention matrices), 2 with it.
    """
    learner, tokens = (
        config.learner,
        config.learner.micro_batch_tokens // config.learner.sequence_parallel,
    )
    trained = (
        shape.weights
        if not config.model.lora
        else shape.layers * 14 * hidden * config.model.lora.rank
    )
    states: dict[str, float] = {
        "weights": shape.weights * shape.weight_bytes,
        "gradients": 4 * trained,
        "optimizer": 12 * trained,
    }
    if config.model.teacher or (
        getattr(config, "algorithm", None) and config.algorithm.kl_coef and not config.model.lora
    ):
        states["reference"] = (reference or shape.weights) * shape.weight_bytes
    if learner.offload_optimizer:
        states.pop("optimizer")
    if config.model.qat and not config.model.gradient_checkpointing:
        # of every layer, until its backward pass, on every rank
        states["rounded"] = shape.body * shape.weight_bytes
    # ZeRO's stages share these out
    for part, stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        if part in states and learner.zero_stage >= stage:
            states[part] /= ranks
    per_layer = 2 if config.model.gradient_checkpointing else 34
    states["activations"] = tokens * hidden * (shape.layers * per_layer + 34)
    states["logits"] = learner.logits_chunk_tokens * vocabulary * 10
    return states


def sizing(
    config: Config,
    shape: Shape,
    hidden: int,
    vocabulary: int,
    gpus: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
) -> list[str]:
    """Returns a table in markdown with one row for each number of learner GPUs.

    A row has what a learner holds, what an engine beside it holds, and what of it an 80 GB GPU has
    room for: both at once, or in turns (engine.sleep).
    """
    lines = [
        "| GPUs | learner, GB a GPU | engine: weights | cache of all its sequences | on 80 GB |",
        "|---|---|---|---|---|",
    ]
    engine = shape.weights * shape.weight_bytes / GB
    for count in gpus:
        own = sum(memory(config, shape, hidden, vocabulary, count).values()) / GB
        sequences = min(config.engine.max_sequences, -(-config.train.completions // count))
        cache = sequences * config.max_sequence_tokens * shape.kv_bytes / GB
        room = (
            "both"
            if own + engine + cache < 76
            else "both, part of the cache"
            if own + engine + cache / 8 < 76
            else ("in turns" if max(own, engine + cache / 8) < 76 else "no")
        )
        lines.append(f"| {count} | {own:.1f} | {engine:.1f} | {cache:.1f} | {room} |")
    return lines
