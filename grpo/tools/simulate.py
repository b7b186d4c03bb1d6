"""`grpo bench CONFIG --simulate DEVICE`: estimates the time of a step on 1 to 1,024 GPUs.

The estimate comes from the rates of the device and the sizes of the model. Nothing is run.

- A decoding step reads the weights and the KV cache, or computes, whichever takes longer (as in
  grpo/metrics/roofline.py). When a sequence ends, the next one starts in its slot.
- The updates of a rollout compute 6 FLOP per weight and token, 8 with gradient checkpointing, and 2
  for each additional forward pass.
- An update exchanges 8 bytes per weight twice between the learners (ZeRO). Its optimizer step reads
  and writes 30 bytes per weight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from grpo.metrics.roofline import ModelShape

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # numbers of GPUs in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """Rates of one device, and the shares of them that sampling and training reach."""

    flops: float  # peak FLOP/s in bfloat16
    bandwidth: float  # bytes/s of its memory
    network: float  # bytes/s to other devices
    # Share of the roofline in decoding. vLLM with a 1.5B model on an H100 takes 3.2 times the time
    # of the roofline (published step of 2.27 s).
    decode: float = 0.31
    # Model FLOPs utilization of RL updates. Published values are 15 % to 35 %.
    update: float = 0.25


DEVICES = {
    "a100": DeviceRates(flops=312e12, bandwidth=2.04e12, network=25e9),
    "h100": DeviceRates(flops=989e12, bandwidth=3.35e12, network=50e9),
    "h200": DeviceRates(flops=989e12, bandwidth=4.8e12, network=50e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One rollout and its updates."""

    lengths: tuple[int, ...]  # tokens of each completion
    prompt: int  # tokens of each prompt
    updates: int = 1
    concurrency: int = 256  # sequences that an engine decodes at the same time
    tensor_parallel: int = 1
    forwards: int = 0  # additional forward passes: old and reference logprobs
    checkpointing: bool = False  # gradient checkpointing


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayout:
    """How the devices share the work."""

    learners: int
    engines: int = 0  # 0: every device samples and trains, one after the other
    asynchronous: bool = False  # sampling never drains, and both sides work at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """Estimated time of a step, in seconds, and the number of devices on each side."""

    seconds: float
    rollout: float
    update: float
    sync: float
    learners: int
    engines: int  # 0 if colocated: all devices do both

    @property
    def idle(self) -> tuple[float, float]:
        """Shares of the step for which learners and engines are idle."""
        return 1 - self.update / self.seconds, 1 - self.rollout / self.seconds


def rates_of_run(rows: Sequence[dict[str, float]], first_row: dict[str, float]) -> DeviceRates:
    """Returns the rates that a run measured. As `network` it uses the memory bandwidth.

    Args:
        rows: Metrics of the rollouts, with the keys `time/PHASE_s` and `bound/PHASE_s`.
        first_row: The first row of the metrics, with the keys `machine/...`.
    """
    bandwidth = first_row["machine/gb_per_s"] * 1e9
    return DeviceRates(
        flops=first_row["machine/gflops"] * 1e9,
        bandwidth=bandwidth,
        network=bandwidth,
        decode=median(row["bound/rollout_s"] / row["time/rollout_s"] for row in rows),
        update=median(row["bound/update_s"] / row["time/update_s"] for row in rows),
    )


def lognormal_lengths(
    count: int, mean: float, longest: int, spread: float = 0.8
) -> tuple[int, ...]:
    """Returns `count` quantiles of a log-normal distribution of completion lengths, in tokens.

    The result is deterministic.

    Args:
        count: Number of completions.
        mean: Mean length before truncation.
        longest: Length at which completions are truncated.
        spread: Standard deviation of the logarithm of the length.
    """
    normal = NormalDist(math.log(mean) - spread**2 / 2, spread)
    quantiles = (math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return tuple(max(1, min(longest, round(length))) for length in quantiles)


def decode_seconds(
    rates: DeviceRates, model: ModelShape, lengths: Sequence[int], work: Workload
) -> float:
    """Returns the seconds that one engine takes to decode completions of these lengths.

    The simulation advances from the end of one completion to the end of the next.
    """
    waiting = list(reversed(lengths))
    end_steps: list[int] = []  # heap of the steps at which running sequences end
    now = 0
    context = 0.0  # tokens in the KV cache
    seconds = 0.0
    while waiting or end_steps:
        while waiting and len(end_steps) < work.concurrency:
            heapq.heappush(end_steps, now + waiting.pop())
            context += work.prompt
        num_steps = end_steps[0] - now
        mean_context = context + len(end_steps) * num_steps / 2
        step_s = _token_step(rates, model, len(end_steps), mean_context, work.tensor_parallel)
        seconds += num_steps * step_s
        now = end_steps[0]
        context += len(end_steps) * num_steps
        while end_steps and end_steps[0] == now:
            heapq.heappop(end_steps)
            # The lengths of running sequences are not tracked. The ended one is assumed to have
            # the average length.
            context -= round(context / (len(end_steps) + 1))
    return seconds


def _token_step(
    rates: DeviceRates, model: ModelShape, num_active: float, context: float, num_gpus: int
) -> float:
    """Returns the seconds of one decoding step of `num_active` sequences."""
    num_bytes = model.weight_bytes + model.kv_bytes_per_token * context
    flop = 2 * (model.body_weights + model.head_weights) * num_active
    read_s = num_bytes / (rates.bandwidth * num_gpus)
    compute_s = flop / (rates.flops * num_gpus)
    return max(read_s, compute_s) / rates.decode


def simulate(
    rates: DeviceRates, model: ModelShape, work: Workload, layout: DeviceLayout
) -> SimulatedStep:
    """Returns the estimated step of `work` on the devices of `layout`."""
    rollout_s = _rollout_seconds(rates, model, work, layout)
    update_s = _update_seconds(rates, model, work, layout.learners)
    # Between colocated learner and engine, a copy reads and writes every byte.
    sync_bandwidth = rates.network if layout.engines else rates.bandwidth / 2
    sync_s = model.weight_bytes / sync_bandwidth
    if layout.asynchronous:
        seconds = max(rollout_s, update_s) + sync_s
    else:
        seconds = rollout_s + update_s + sync_s
    return SimulatedStep(
        seconds=seconds,
        rollout=rollout_s,
        update=update_s,
        sync=sync_s,
        learners=layout.learners,
        engines=layout.engines,
    )


def _rollout_seconds(
    rates: DeviceRates, model: ModelShape, work: Workload, layout: DeviceLayout
) -> float:
    """Returns the seconds of the slowest engine. Asynchronous engines share the work evenly."""
    num_devices = layout.engines or layout.learners
    num_engines = max(1, num_devices // work.tensor_parallel)
    if layout.asynchronous:
        return _steady_rollout_seconds(rates, model, work, num_engines)
    longest = max(work.lengths)
    # The slowest engine has an average share of the completions, but the longest of all.
    share = sorted(work.lengths)[num_engines // 2 :: num_engines] or [longest]
    slowest_share = [*share[:-1], longest]
    return decode_seconds(rates, model, slowest_share, work)


def _steady_rollout_seconds(
    rates: DeviceRates, model: ModelShape, work: Workload, num_engines: int
) -> float:
    """Returns the seconds of a rollout if the number of running sequences stays constant."""
    num_tokens = sum(work.lengths)
    mean_length = num_tokens / len(work.lengths)
    num_active = min(work.concurrency, len(work.lengths) / num_engines)
    context = num_active * (work.prompt + mean_length / 2)
    step_s = _token_step(rates, model, num_active, context, work.tensor_parallel)
    return num_tokens / num_engines / num_active * step_s


def _update_seconds(rates: DeviceRates, model: ModelShape, work: Workload, learners: int) -> float:
    num_tokens = sum(work.lengths) + len(work.lengths) * work.prompt
    flop_per_weight = 2 * work.forwards + (8 if work.checkpointing else 6)
    flop = flop_per_weight * model.num_weights * num_tokens
    compute_s = flop / (learners * rates.flops * rates.update)
    exchange_s = 2 * 8 * model.num_weights * (learners - 1) / learners / rates.network
    optimizer_s = 30 * model.num_weights / learners / rates.bandwidth
    return compute_s + work.updates * (exchange_s + optimizer_s)


def best_split(
    rates: DeviceRates, model: ModelShape, work: Workload, devices: int, *, asynchronous: bool
) -> SimulatedStep:
    """Returns the fastest step over the splits of `devices` into learners and engines.

    Up to 31 splits are tried, with 1/32 to 31/32 of the devices as learners.
    """
    candidates = {max(1, round(devices * share / 32)) for share in range(1, 32)}
    steps = []
    for learners in sorted(candidates & set(range(1, devices))):
        engines = devices - learners
        layout = DeviceLayout(learners=learners, engines=engines, asynchronous=asynchronous)
        steps.append(simulate(rates, model, work, layout))
    return min(steps, key=lambda step: step.seconds)


def table(
    rates: DeviceRates, model: ModelShape, work: Workload, sizes: Sequence[int] = SIZES
) -> list[str]:
    """Returns a markdown table of the step time, one row per number of GPUs.

    It compares colocated devices with the best split, synchronous and asynchronous. The last two
    columns describe the asynchronous split.
    """
    lines = [
        "| GPUs | colocated | split, synchronous | split, asynchronous | learners : engines "
        "| idle: learners, engines |",
        "|---|---|---|---|---|---|",
    ]
    for devices in sizes:
        colocated = simulate(rates, model, work, DeviceLayout(learners=devices))
        if devices < 2:
            lines.append(f"| {devices} | {colocated.seconds:.1f} s | | | | |")
            continue
        synchronous = best_split(rates, model, work, devices, asynchronous=False)
        asynchronous = best_split(rates, model, work, devices, asynchronous=True)
        learners_idle, engines_idle = asynchronous.idle
        lines.append(
            f"| {devices} | {colocated.seconds:.1f} s | {synchronous.seconds:.1f} s | "
            f"{asynchronous.seconds:.1f} s | {asynchronous.learners} : {asynchronous.engines} | "
            f"{learners_idle:.0%}, {engines_idle:.0%} |"
        )
    return lines
