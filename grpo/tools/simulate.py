"""`grpo bench CONFIG --simulate DEVICE`.

It computes step time, idle shares and the best split of 1 to 1,024 GPUs from rates, and runs
nothing.

Decoding reads weights and cache once a step or computes, whichever is longer (the roofline of
grpo/metrics/roofline.py), and a sequence that ends makes room for the next; an update is 6 FLOPs
per weight and token, 8 with gradient checkpointing; ZeRO exchanges 8 bytes per weight twice.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from grpo.metrics.roofline import Shape

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one device. `decode` and `update`: what share of its peaks sampling and learning reach."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # memory, bytes a second
    network: float  # to other devices, bytes a second
    # 1.5B on an H100 under vLLM: 3.2 times the roofline (recipes: published step of 2.27 s)
    decode: float = 0.31
    update: float = 0.25  # model FLOPs utilisation of RL updates: 15-35 % are published


DEVICES = {
    "a100": Rates(flops=312e12, bandwidth=2.04e12, network=25e9),
    "h100": Rates(flops=989e12, bandwidth=3.35e12, network=50e9),
    "h200": Rates(flops=989e12, bandwidth=4.8e12, network=50e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One rollout and its updates."""

    lengths: tuple[int, ...]  # of all completions
    prompt: int  # tokens
    updates: int = 1
    concurrency: int = 256  # sequences an engine decodes at once
    tensor_parallel: int = 1
    forwards: int = 0  # forward passes beside the update's own: old and reference logprobs
    checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the devices share the work."""

    learners: int
    engines: int = 0  # 0: every device samples and learns, in turns
    asynchronous: bool = False  # rollouts never drain, and both sides work at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a step and its phases.

    `learners` of the devices learn, the rest sample (all do both when colocated).
    """

    seconds: float
    rollout: float
    update: float
    sync: float
    learners: int
    engines: int

    @property
    def idle(self) -> tuple[float, float]:
        """Returns what share of the step learners and engines do nothing."""
        return 1 - self.update / self.seconds, 1 - self.rollout / self.seconds


def measured(rows: Sequence[dict[str, float]], first: dict[str, float]) -> Rates:
    """Returns the rates of a run, from its metrics.

    They are the machine's own rates, and what share of the bounds the run's phases reached.
    """
    share = {
        phase: median(row[f"bound/{phase}_s"] / row[f"time/{phase}_s"] for row in rows)
        for phase in ("rollout", "update")
    }
    flops, bandwidth = first["machine/gflops"] * 1e9, first["machine/gb_per_s"] * 1e9
    return Rates(
        flops=flops,
        bandwidth=bandwidth,
        network=bandwidth,
        decode=share["rollout"],
        update=share["update"],
    )


def lengths(count: int, mean: float, longest: int, spread: float = 0.8) -> tuple[int, ...]:
    """Returns quantiles of a log-normal distribution of that mean, cut off at `longest`.

    Nothing is drawn at random.
    """
    normal = NormalDist(math.log(mean) - spread**2 / 2, spread)
    return tuple(
        max(1, min(longest, round(math.exp(normal.inv_cdf((i + 0.5) / count)))))
        for i in range(count)
    )


def decode_seconds(rates: Rates, model: Shape, lengths: Sequence[int], work: Work) -> float:
    """Returns how long one engine takes for completions of these lengths.

    It goes from the end of one completion to the next, with all that run meanwhile.
    """
    waiting = list(reversed(lengths))
    running: list[int] = []  # the steps at which sequences end, a heap
    now = 0
    context = 0.0
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < work.concurrency:
            heapq.heappush(running, now + waiting.pop())
            context += work.prompt
        steps = running[0] - now
        mean_context = context + len(running) * steps / 2
        per_step = _token_step(rates, model, len(running), mean_context, work.tensor_parallel)
        seconds += steps * per_step
        now = running[0]
        context += len(running) * steps
        while running and running[0] == now:
            heapq.heappop(running)
            context -= round(context / (len(running) + 1))
    return seconds


def _token_step(rates: Rates, model: Shape, active: float, context: float, size: int) -> float:
    read = (model.weights * model.weight_bytes + model.kv_bytes * context) / (
        rates.bandwidth * size
    )
    return max(read, 2 * (model.body + model.head) * active / (rates.flops * size)) / rates.decode


def simulate(rates: Rates, model: Shape, work: Work, layout: Layout) -> Step:
    """Returns a step of `work` on the devices of `layout`."""
    rollout = _rollout_seconds(rates, model, work, layout)
    update = _update_seconds(rates, model, work, layout.learners)
    weight_bytes = model.weights * model.weight_bytes
    sync = weight_bytes / (rates.network if layout.engines else rates.bandwidth / 2)
    seconds = (max(rollout, update) if layout.asynchronous else rollout + update) + sync
    return Step(
        seconds=seconds,
        rollout=rollout,
        update=update,
        sync=sync,
        learners=layout.learners,
        engines=layout.engines,
    )


def _rollout_seconds(rates: Rates, model: Shape, work: Work, layout: Layout) -> float:
    """Returns the seconds of the slowest engine; asynchronous engines share the work evenly."""
    num_engines = max(1, (layout.engines or layout.learners) // work.tensor_parallel)
    if not layout.asynchronous:
        lengths = sorted(work.lengths)[num_engines // 2 :: num_engines] or [max(work.lengths)]
        return decode_seconds(rates, model, [*lengths[:-1], max(work.lengths)], work)
    num_tokens = sum(work.lengths)
    mean = num_tokens / len(work.lengths)
    active = min(work.concurrency, len(work.lengths) / num_engines)
    context = active * (work.prompt + mean / 2)
    per_token = _token_step(rates, model, active, context, work.tensor_parallel)
    return num_tokens / num_engines / active * per_token


def _update_seconds(rates: Rates, model: Shape, work: Work, learners: int) -> float:
    num_tokens = sum(work.lengths) + len(work.lengths) * work.prompt
    passes = (8 if work.checkpointing else 6) + 2 * work.forwards
    exchange = 2 * 8 * model.weights * (learners - 1) / learners / rates.network
    seconds = passes * model.weights * num_tokens / (learners * rates.flops * rates.update)
    optimizer = 30 * model.weights / learners / rates.bandwidth
    return seconds + work.updates * (exchange + optimizer)


def best_split(rates: Rates, model: Shape, work: Work, devices: int, *, asynchronous: bool) -> Step:
    """Returns the fastest step with `devices` shared out between learners and engines."""
    sizes = {max(1, round(devices * share / 32)) for share in range(1, 32)}
    steps = []
    for learners in sorted(sizes & set(range(1, devices))):
        engines = devices - learners
        layout = Layout(learners=learners, engines=engines, asynchronous=asynchronous)
        steps.append(simulate(rates, model, work, layout))
    return min(steps, key=lambda step: step.seconds)


def table(rates: Rates, model: Shape, work: Work, sizes: Sequence[int] = SIZES) -> list[str]:
    """Returns a markdown table.

    It compares colocated, synchronous with the best split, and asynchronous with the best split.
    """
    lines = [
        "| GPUs | colocated | split, in turns | asynchronous | learn : sample | idle: learners, "
        "engines |",
        "|---|---|---|---|---|---|",
    ]
    for devices in sizes:
        colocated = simulate(rates, model, work, Layout(learners=devices))
        if devices < 2:
            lines.append(f"| {devices} | {colocated.seconds:.1f} s | | | | |")
            continue
        split = best_split(rates, model, work, devices, asynchronous=False)
        both = best_split(rates, model, work, devices, asynchronous=True)
        lines.append(
            f"| {devices} | {colocated.seconds:.1f} s | {split.seconds:.1f} s | "
            f"{both.seconds:.1f} s | {both.learners} : {both.engines} | "
            f"{both.idle[0]:.0%}, {both.idle[1]:.0%} |"
        )
    return lines
