"""The training loop: sample, score, update, sync, prove, write down. It holds the run's two counters and nothing else of its state."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from grpo import rollout as rollouts
from grpo import roofline
from grpo.advantages import group_advantages, to_samples
from grpo.batch import micro_batches, token_weights
from grpo.checkpoint import RunDirectory
from grpo.config import Config
from grpo.engines import Engine, SamplingOptions
from grpo.learners.deepspeed import Learner
from grpo.metrics import Display, Timer
from grpo.plugins import RewardFunction
from grpo.probe import Probe, sync
from grpo.prompts import Prompts
from grpo.signals import Signals
from grpo.types import Batch, Group, Problem, Sample, ScoredGroup
from rewards._pool import Pool


@dataclass(kw_only=True)
class Loop:
    """Everything a run is made of, put together by stages/train.py."""

    config: Config
    run: RunDirectory
    engine: Engine
    learner: Learner
    prompts: Prompts
    rewards: dict[str, tuple[RewardFunction, float]]
    take: Callable[[int, int], list[Problem]]  # (position, n) -> training problems
    held_out: list[Problem]
    probe: Probe
    display: Display
    record_row: Callable[[dict[str, Any]], None]
    signals: Signals
    machine: roofline.Machine
    shape: roofline.Shape
    pool: Pool
    rollout: int = 0  # rollouts done: whole, with their updates
    saved: int = -1  # the last checkpoint's rollouts
    latest: dict[str, Any] = field(default_factory=dict)  # metrics that a checkpoint is judged by

    def start(self, fresh: bool) -> None:
        """Proves the way from learner to engine and puts the true weights there; a fresh run is evaluated before it learns."""
        self.display.phase(self.rollout, "canary")
        if self.config.probe.canary:
            gap = self.probe.canary(version=0)
            self.display.say(f"canary: perturbed weights arrived in the engine (gap {gap:.1e})")
        row: dict[str, Any] = {"step": self.rollout, "rollout": self.rollout, "update": self.learner.updates}
        row |= {"machine/gflops": self.machine.flops / 1e9, "machine/gb_per_s": self.machine.bandwidth / 1e9}
        sync(self.engine, self.learner, version=self.rollout + 1)  # version n sampled rollout n
        row["probe/gap"] = self.probe.check()
        if fresh:
            self.evaluate(row)
            self.record(row)
        elif self._due(self.config.eval.every) and not any(key.startswith("eval/") for key in self.latest):
            self.evaluate(row)  # the interrupt came before it
            self.record(row)

    def train(self) -> None:
        """Runs to the last rollout. On `Interrupted` the state is that of the last whole rollout."""
        self.display.begin(self.rollout)
        while self.rollout < self.config.train.rollouts:
            self.step()
            if self._due(self.config.checkpoint.every):
                self.save()

    def step(self) -> None:
        """One rollout and its updates, from problems to a line in the metrics."""
        config, timer = self.config, Timer()
        problems = self.take(self.rollout * config.train.problems, config.train.problems)
        options = sampling_options(config, self.prompts, config.sampling.temperature)
        with timer("rollout"):
            groups = rollouts.sample(
                self.engine, self.prompts, problems, options, group_size=config.train.group_size,
                run_seed=config.seed, rollout=self.rollout, on_progress=self._progress("rollout"),
            )  # fmt: skip
            self.engine.sleep()
        with timer("rewards"):
            self.display.phase(self.rollout, "rewards")
            self.pool.counts.clear()  # an evaluation's are not this rollout's
            scored = rollouts.score(groups, self.rewards, self.prompts.for_rewards)
            counts = {f"verifier/{name}": float(count) for name, count in self.pool.counts.items()}
        self.run.write_samples(f"step-{self.rollout + 1:06d}", sample_rows(scored, config.algorithm.advantage))
        row = {"step": self.rollout + 1, "rollout": self.rollout + 1, **rollouts.describe(scored), **counts}
        with timer("update"):
            row |= self.update(to_samples(scored, config.algorithm.advantage))
        self.rollout += 1
        row["update"] = self.learner.updates
        try:
            with timer("sync"):
                self.display.phase(self.rollout - 1, "sync")
                self.engine.wake()
                report = sync(self.engine, self.learner, version=self.rollout + 1)
            with timer("probe"):
                row |= {"sync/seconds": report.seconds, "sync/bytes": report.num_bytes, "probe/gap": self.probe.check()}
                row["probe/gap_ratio"] = row["probe/gap"] / self.probe.first_gap if self.probe.first_gap else 1.0
            if self._due(config.eval.every):
                with timer("eval"):
                    self.evaluate(row)
        finally:
            row |= timer.metrics() | self._bounds(groups, int(config.train.updates_per_rollout - row.get("update/skipped", 0)))
            row["rollout/tokens_per_s"] = row["completion/tokens"] / row["time/rollout_s"]
            self.record(row)

    def _bounds(self, groups: list[Group], updates: int) -> dict[str, float]:
        least = roofline.bounds(self.machine, self.shape, groups, updates=updates, reference=self.config.algorithm.kl_coef > 0)
        return {f"bound/{phase}_s": seconds for phase, seconds in least.items()} | {"bound/total_s": sum(least.values())}

    def update(self, samples: list[Sample]) -> dict[str, float]:
        """Makes the rollout's updates, one for each random mini-batch of its samples; returns their mean metrics."""
        config = self.config
        parts = minibatches(samples, config.train.updates_per_rollout, seed=rollouts.seed_of(config.seed, self.rollout, "mini-batches"))
        if config.algorithm.kl_coef == 0:  # without a signal the gradient is zero, and Adam's momentum is not to act alone
            parts = [part for part in parts if any(any(sample.advantages) for sample in part)]
        batches = [self._batches(part) for part in parts if part]
        skipped = float(config.train.updates_per_rollout - len(batches))
        if not batches:
            return {"update/skipped": skipped}
        if len(batches) > 1:  # the policy moves between updates: its logprobs before the first one are the old ones
            batches = [self._attach(part, "old_logprobs", reference=False) for part in batches]
        if config.algorithm.kl_coef > 0:
            batches = [self._attach(part, "ref_logprobs", reference=True) for part in batches]
        reports = []
        for number, part in enumerate(batches):
            reports.append(self.learner.update(part, self._update_progress(first=number == 0)))
        metrics = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
        return metrics | {"update/skipped": skipped, "mismatch/max_weight": max(report["mismatch/max_weight"] for report in reports)}

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        config = self.config
        weights = token_weights([sample.completion_length for sample in samples], config.algorithm.reduction, config.sampling.max_tokens)
        return micro_batches(samples, weights, max_tokens=config.learner.micro_batch_tokens, packed=config.model.packed)

    def _attach(self, batches: list[Batch], name: str, *, reference: bool) -> list[Batch]:
        scores = self.learner.score(batches, reference=reference)
        return [replace(batch, **{name: logprobs}) for batch, logprobs in zip(batches, scores, strict=True)]  # type: ignore[arg-type]

    def evaluate(self, row: dict[str, Any]) -> None:
        """Adds accuracy and the other metrics on held-out problems to a row; keeps the completions."""
        if not self.held_out:
            return
        settings = self.config.eval
        found, scored = rollouts.evaluate(
            self.engine, self.prompts, self.held_out, self.rewards, sampling_options(self.config, self.prompts, settings.temperature),
            samples=settings.samples, run_seed=self.config.seed, on_progress=self._progress("evaluation"),
        )  # fmt: skip
        self.run.write_samples(f"eval-{self.rollout:06d}", sample_rows(scored, self.config.algorithm.advantage))
        row |= found
        accuracy = row.get("eval/accuracy")
        if accuracy is not None:
            self.display.say(f"held-out accuracy after {self.rollout} rollouts: {accuracy:.1%} of {len(self.held_out)} problems")

    def record(self, row: dict[str, Any]) -> None:
        self.latest = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self.record_row(row)
        if "reward/mean" in row:
            self.display.row(row)

    def save(self) -> None:
        """Writes a checkpoint of the last whole rollout, unless there is one."""
        if self.saved == self.rollout:
            return
        self.display.phase(self.rollout, "checkpoint")
        state = {
            "updates": self.learner.updates, "position": self.rollout * self.config.train.problems, "seed": self.config.seed,
            "first_gap": self.probe.first_gap, "metrics": self.latest,
        }  # fmt: skip
        self.run.save(self.rollout, state, self.learner.save)
        self.run.prune(self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)
        self.saved = self.rollout

    def _due(self, every: int) -> bool:
        return every > 0 and (self.rollout % every == 0 or self.rollout == self.config.train.rollouts)

    def _progress(self, phase: str) -> Callable[[int, int], None]:
        self.display.phase(self.rollout, phase)
        return lambda done, total: self.display.phase(self.rollout, phase, f"{done}/{total}")

    def _update_progress(self, first: bool) -> Callable[[int, int], None]:
        def show(done: int, total: int) -> None:
            if first:  # nothing of the rollout's updates is applied yet: it can be given up
                self.signals.check()
            self.display.phase(self.rollout, "update", f"{done}/{total}")

        return show


def sampling_options(config: Config, prompts: Prompts, temperature: float) -> SamplingOptions:
    sampling = config.sampling
    return SamplingOptions(
        max_tokens=sampling.max_tokens, temperature=temperature, top_p=sampling.top_p, top_k=sampling.top_k, stop=prompts.stop,
        stop_token_ids=prompts.stop_token_ids, ignore_eos=sampling.ignore_eos,
    )  # fmt: skip


def minibatches(samples: list[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Returns the samples in `count` random parts of nearly equal size (one part: in their order)."""
    if count == 1:
        return [samples]
    order = random.Random(seed).sample(samples, len(samples))
    return [order[i::count] for i in range(count)]


def sample_rows(groups: list[ScoredGroup], advantage: str) -> list[dict[str, Any]]:
    """Returns one JSON object a completion: what was asked, what came, and how it was judged."""
    return [
        {
            "problem": scored.group.problem.id, "question": scored.group.problem.question, "answer": scored.group.problem.answer,
            "meta": scored.group.problem.meta,
            "completion": completion.text, "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason,
            "reward": reward, "parts": part, "faults": fault, "verdict": verdict and verdict.value, "reason": verdict and verdict.reason,
            "advantage": value, "version": completion.versions[0][0],
        }
        for scored in groups
        for completion, reward, part, fault, verdict, value in zip(
            scored.group.completions, scored.rewards, scored.parts, scored.faults, scored.verdicts,
            group_advantages(scored.rewards, advantage), strict=True,
        )
    ]  # fmt: skip
