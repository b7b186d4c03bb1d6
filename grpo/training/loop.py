"""The training loop: sample, score, update, sync, prove, write down.

It holds the run's two counters and nothing else of its state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo.config import Config
from grpo.engines import Engine, EngineError
from grpo.experience import rollout as rollouts
from grpo.experience.plugins import RewardFunction
from grpo.experience.prompts import Prompts
from grpo.experience.selection import Selection
from grpo.learning.advantages import advantages, lengths, to_samples
from grpo.learning.batch import epoch_order, micro_batches, minibatches, token_weights
from grpo.learning.learner import Learner
from grpo.losses import _terms
from grpo.metrics import roofline
from grpo.metrics.diagnosis import Watch
from grpo.run import ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import Display, Timer
from grpo.run.signals import Interrupted, Signals
from grpo.training.weight_sync import Probe, sync
from grpo.types import Batch, Exhausted, Group, Problem, Sample, ScoredGroup
from rewards import language
from rewards.workers.pool import Pool


@dataclass(kw_only=True)
class Loop:
    """Everything a run is made of, put together by stages/train.py."""

    config: Config
    run: RunDirectory
    engine: Engine
    learner: Learner
    prompts: Prompts
    rewards: dict[str, tuple[RewardFunction, float]]
    selection: Selection
    held_out: list[Problem]
    probe: Probe
    display: Display
    record_row: Callable[[dict[str, Any]], None]
    signals: Signals
    machine: roofline.Machine
    shape: roofline.Shape
    pool: Pool
    watch: Watch = field(default_factory=Watch)  # what is to be said of the numbers
    rollout: int = 0  # rollouts done: whole, with their updates
    saved: int = -1  # the last checkpoint's rollouts
    # nothing of another rollout is in the learner, and nothing speaks against its weights: it can
    # be saved
    whole: bool = True
    # the selection's state after the last whole rollout
    selected: dict[str, Any] = field(default_factory=dict)
    idle: int = 0  # rollouts in a row without an update
    # findings that ask for something to be done
    alarms: list[tuple[str, str]] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)  # metrics that a checkpoint is judged by

    def start(self, fresh: bool) -> None:
        """Proves the way from learner to engine and puts the true weights there.

        A fresh run is evaluated before it learns.
        """
        self.display.phase(self.rollout, "canary")
        if self.config.probe.canary:
            gap = self.probe.canary(0, self.signals)
            self.display.say(f"canary: perturbed weights arrived in the engine (gap {gap:.1e})")
        row: dict[str, Any] = {
            "step": self.rollout,
            "rollout": self.rollout,
            "update": self.learner.updates,
        }
        row |= {
            "machine/gflops": self.machine.flops / 1e9,
            "machine/gb_per_s": self.machine.bandwidth / 1e9,
        }
        # version n sampled rollout n
        sync(self.engine, self.learner, self.rollout + 1, self.signals)
        row |= self.probe.check()
        if fresh:
            self.evaluate(row)
            self.record(row)
        elif self._due(self.config.eval.every) and not any(
            key.startswith("eval/") for key in self.latest
        ):
            self.evaluate(row)  # the interrupt came before it
            self.record(row)

    def train(self) -> None:
        """Runs to the last rollout.

        On `Interrupted` the state is that of the last whole rollout.
        """
        self.display.begin(self.rollout)
        while self.rollout < self.config.train.rollouts:
            self.step()
            self.alarm()
            if self._due(self.config.checkpoint.every):
                self.save()

    def step(self) -> None:
        """One rollout and its updates, from problems to a line in the metrics."""
        config, timer, stream = self.config, Timer(), self.selection.stream
        self.pool.counts.clear()  # an evaluation's are not this rollout's
        _ = stream and stream.idle()  # nor is what was idle before it
        try:
            # what is waited for
            with timer("rollout") if self.selection.streamed else contextlib.nullcontext():
                fresh, used = self.selection.collect(
                    lambda problems, number: self._sample(problems, number, timer)
                )
        except Exhausted:
            self.run.write_samples(
                f"step-{self.rollout + 1:06d}", rollouts.sample_rows(self.selection.fresh)
            )
            raise
        ranks.together("the engines' sleep", self.engine.sleep)
        row = {"step": self.rollout + 1, "rollout": self.rollout + 1, **rollouts.describe(fresh)}
        texts = [
            (scored.group.completions[0].text, scored.group.problem.question)
            for scored in fresh[:32]
        ]
        row["completion/language"] = rollouts.mean(
            [language.share(text, language.of(question)) for text, question in texts]
        )
        for counts in ranks.gather("the verifiers' counts", dict(self.pool.counts)):
            row |= {
                f"verifier/{name}": row.get(f"verifier/{name}", 0.0) + count
                for name, count in counts.items()
            }
        row |= {
            "group/sampled": float(len(fresh)),
            "group/used": float(len(used)),
            "group/carried": float(len(self.selection.carried)),
        }
        if config.train.max_staleness:
            row |= rollouts.staleness(used or fresh, self.rollout + 1) | (
                stream.depths() if stream else {}
            )
        # rewards are only measured: an undecided one leaves no completion out
        if config.algorithm.advantage == "teacher":
            used = [
                replace(scored, rewards=tuple(reward or 0.0 for reward in scored.rewards))
                for scored in used
            ]
        with timer("update"):
            penalties, kl = self._penalties(used)
        self.whole = False
        values = advantages(
            [scored.rewards for scored in used],
            lengths(used),
            config.algorithm.advantage,
            penalties,
        )
        self.run.write_samples(
            f"step-{self.rollout + 1:06d}", rollouts.sample_rows(fresh, used, values)
        )
        samples = to_samples(used, values, mask_truncated=config.algorithm.truncated == "mask")
        row["histogram/advantage"] = rollouts.advantage_histogram(samples)
        self.run.write_update(self.rollout + 1, samples, config.logging.replay)
        with timer("update"):
            row |= kl | self.update(samples)
        self.idle = 0 if row["update/made"] else self.idle + 1
        self.rollout += 1
        self.selected = self.selection.state()
        row["update"] = self.learner.updates
        failed: Exception | None = None
        try:
            with timer("sync"):
                self.display.phase(self.rollout - 1, "sync")
                ranks.together("the engines' waking", self.engine.wake)
                report = sync(self.engine, self.learner, self.rollout + 1, self.signals)
            with timer("probe"):
                row |= {
                    "sync/seconds": report.seconds,
                    "sync/bytes": report.num_bytes,
                } | self.probe.check()
            self.whole = True
            if self._due(config.eval.every):
                with timer("eval"):
                    self.evaluate(row)
        # what was measured is written down first, where all ranks have met it
        except Exception as error:
            self.whole, failed = self.whole or isinstance(error, EngineError), error
            if not (ranks.of_all(error) or isinstance(error, Interrupted)):
                raise
        row |= timer.metrics() | self._bounds(
            [scored.group for scored in fresh], int(row["update/made"])
        )
        row["rollout/tokens_per_s"] = row["completion/tokens"] / row["time/rollout_s"]
        row["idle/engine"], row["idle/learner"] = (
            1 - timer.seconds[part] / row["time/total_s"] for part in ("rollout", "update")
        )
        row |= {
            f"engine/{name}": float(count)
            for name, count in getattr(self.engine, "counts", {}).items()
        }
        row |= {"idle/engine": min(1.0, stream.idle() / row["time/total_s"])} if stream else {}
        self.record(row)
        if failed:
            raise failed
        if self.idle and config.algorithm.max_idle and self.idle % config.algorithm.max_idle == 0:
            told = (
                f"the completions of every group have equal rewards ({row['reward/mean']:.3g} in "
                "the mean). The problems are too hard or"
            )
            told += " too easy for this model, or a reward cannot read its answers: see samples/"
            raise Exhausted(f"{self.idle} rollouts in a row taught nothing: {told}")

    def _sample(self, problems: list[Problem], number: int, timer: Timer) -> list[ScoredGroup]:
        """Returns scored groups of problems: sampling `number` of this rollout."""
        config = self.config
        name = f"{self.rollout}+{number}" if number else self.rollout

        def own(share: slice) -> list[ScoredGroup]:
            with timer("rollout"):
                groups = rollouts.sample(
                    self.engine,
                    self.prompts,
                    problems,
                    rollouts.sampling_options(config, self.prompts, config.sampling.temperature),
                    group_size=config.train.group_size,
                    run_seed=config.seed,
                    rollout=name,
                    on_progress=self._progress("rollout"),
                    share=share,
                )
            with timer("rewards"):
                self.display.phase(self.rollout, "rewards")
                return rollouts.score(groups, self.rewards, self.prompts.for_rewards)

        return ranks.spread("the rollout of the other ranks", own)

    def _penalties(
        self, groups: list[ScoredGroup]
    ) -> tuple[list[list[list[float]]] | None, dict[str, float]]:
        """Returns the groups' `costs`, nested as the groups are, and the metric `kl/ref`.

        The metric is the mean cost per token before its coefficient.
        """
        zeros = [[(0.0,) * length for length in row] for row in lengths(groups)]
        # the undecided too: places stay
        whole = [replace(scored, rewards=(0.0,) * len(scored.rewards)) for scored in groups]
        if (costs := self.costs(to_samples(whole, zeros))) is None:
            return None, {}
        every, rows = [cost for row in costs for cost in row], iter(costs)
        coefficient = (
            1.0 if self.config.algorithm.advantage == "teacher" else self.config.algorithm.kl_coef
        )
        return [[next(rows) for _ in scored.rewards] for scored in groups], {
            "kl/ref": sum(every) / len(every) / coefficient
        }

    def costs(self, samples: list[Sample]) -> list[list[float]] | None:
        """Returns what each completion token of each sample costs.

        There are costs with the KL in the reward or with a teacher. Otherwise it returns None.
        """
        algorithm = self.config.algorithm
        if not samples or not (
            (teacher := algorithm.advantage == "teacher")
            or (algorithm.kl_coef and algorithm.kl_in == "reward")
        ):
            return None
        coefficient, estimator = (
            (1.0, "k1") if teacher else (algorithm.kl_coef, algorithm.kl_estimator)
        )
        batches = self._batches(samples)
        scores = zip(
            batches,
            self.learner.score(batches),
            self.learner.score(batches, reference=True),
            strict=True,
        )
        found: dict[int, list[float]] = {}
        for batch, (own, _), (ref, _) in scores:
            costs = coefficient * _terms.kl(own, ref, estimator)
            found |= (
                {}
                if batch.idle
                else {
                    i: costs[place][batch.token_mask[place]].tolist()
                    for place, i in enumerate(batch.index)
                }
            )
        found = {i: row for part in ranks.gather("the penalties", found) for i, row in part.items()}
        return [found[i] for i in range(len(samples))]

    def _bounds(self, groups: list[Group], updates: int) -> dict[str, float]:
        reference = self.config.algorithm.kl_coef > 0
        least = roofline.bounds(
            self.machine,
            self.shape,
            groups,
            updates=updates,
            reference=reference,
            ranks=ranks.count(),
        )
        return {f"bound/{phase}_s": seconds for phase, seconds in least.items()} | {
            "bound/total_s": sum(least.values())
        }

    def update(self, samples: list[Sample]) -> dict[str, float]:
        """Makes the rollout's updates, one for each random mini-batch of its samples and epoch.

        Returns their mean metrics.
        """
        config, algorithm = self.config, self.config.algorithm
        seed = rollouts.seed_of(config.seed, self.rollout, "mini-batches")
        parts = minibatches(samples, config.train.updates_per_rollout, seed) if samples else []
        # Without a signal KL, entropy bonus and momentum are not to act alone: they would move a
        # policy that learns nothing.
        parts = [part for part in parts if any(any(sample.advantages) for sample in part)]
        ranks.together("the update", self.signals.check)
        batches = self._attach(parts)
        order = [
            n
            for epoch in range(config.train.epochs)
            for n in epoch_order(len(batches), seed, epoch)
        ]
        reports, before = [], self.learner.updates
        for number, n in enumerate(order):
            reports.append(
                self.learner.update(batches[n], self._update_progress(first=number == 0))
            )
        every = algorithm.reference_reset
        if every and algorithm.kl_coef and before // every != self.learner.updates // every:
            self.learner.reset_reference(optimizer=algorithm.reset_optimizer)
        counts = {"update/made": float(len(reports))}
        counts["update/skipped"] = float(
            config.train.epochs * config.train.updates_per_rollout - len(reports)
        )
        if not reports:
            return counts
        metrics = {
            name: sum(report[name] for report in reports) / len(reports) for name in reports[0]
        }
        return (
            metrics
            | counts
            | {"mismatch/max_weight": max(report["mismatch/max_weight"] for report in reports)}
        )

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        config = self.config
        weights = token_weights(samples, config.algorithm.reduction, config.sampling.max_tokens)
        return micro_batches(
            samples,
            weights,
            max_tokens=config.learner.micro_batch_tokens,
            packed=config.model.packed,
            share=self.learner.share,
        )

    def _attach(self, parts: list[list[Sample]]) -> list[list[Batch]]:
        """Returns the mini-batches with what the recipe needs before the first update.

        These are the old and reference logprobs, and advantages of 0 where the entropy is not among
        the top.
        """
        algorithm, epochs = self.config.algorithm, self.config.train.epochs
        built = [self._batches(part) for part in parts]
        batches = [batch for part in built for batch in part]
        # The weights that sampled a token are gone: the ratio is to what did, or the mismatch's
        # correction bridges it (AReaL 2505.24298).
        older, now = algorithm.mismatch == "none", self.rollout + 1
        # of all ranks
        versions = (
            {version for part in parts for sample in part for version in sample.versions or ()}
            if older
            else {now}
        )
        wanted = algorithm.old_logprobs == "learner" and (
            len(parts) * epochs > 1 or versions != {now}
        )
        if algorithm.top_entropy < 1 or (wanted and now in versions):
            scores = self.learner.score(batches)
            if algorithm.top_entropy < 1:
                own = [
                    entropies[batch.token_mask]
                    for batch, (_, entropies) in zip(batches, scores, strict=True)
                    if not batch.idle
                ]
                every = torch.cat(
                    [entropies for part in ranks.gather("the entropies", own) for entropies in part]
                )
                least = every.sort(descending=True).values[
                    max(0, round(algorithm.top_entropy * len(every)) - 1)
                ]
                kept = [
                    batch.advantages * (entropies >= least)
                    for batch, (_, entropies) in zip(batches, scores, strict=True)
                ]
                batches = [
                    replace(batch, advantages=advantage)
                    for batch, advantage in zip(batches, kept, strict=True)
                ]
            batches = [
                replace(
                    batch,
                    old_logprobs=logprobs.where(batch.versions == now, batch.sampler_logprobs)
                    if older
                    else logprobs,
                )
                for batch, (logprobs, _) in zip(batches, scores, strict=True)
            ]
        if algorithm.old_logprobs == "sampler" or (wanted and now not in versions):
            batches = [replace(batch, old_logprobs=batch.sampler_logprobs) for batch in batches]
        if algorithm.kl_coef and algorithm.kl_in == "loss":
            scores = self.learner.score(batches, reference=True)
            batches = [
                replace(batch, ref_logprobs=logprobs)
                for batch, (logprobs, _) in zip(batches, scores, strict=True)
            ]
        left = iter(batches)
        return [[next(left) for _ in part] for part in built]

    def evaluate(self, row: dict[str, Any]) -> None:
        """Adds accuracy and the other metrics on held-out problems to a row.

        It keeps the completions.
        """
        if not self.held_out:
            return
        settings = self.config.eval
        found, rows = rollouts.evaluate(
            self.engine,
            self.prompts,
            self.held_out,
            self.rewards,
            rollouts.sampling_options(self.config, self.prompts, settings.temperature),
            samples=settings.samples,
            run_seed=self.config.seed,
            on_progress=self._progress("evaluation"),
        )
        self.run.write_samples(f"eval-{self.rollout:06d}", rows)
        row |= found
        accuracy = row.get("eval/accuracy")
        if accuracy is not None:
            self.display.say(
                f"held-out accuracy after {self.rollout} rollouts: {accuracy:.1%} of "
                f"{len(self.held_out)} problems"
            )

    def record(self, row: dict[str, Any]) -> None:
        """Writes and shows rank 0's row of metrics, and notes its findings that raise an alarm."""
        # times differ, what is made of them must not
        row = ranks.gather("the other ranks' row", row)[0]
        self.latest = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self.record_row(row)
        if "reward/mean" in row:
            self.display.row(row)
        for finding in self.watch.see(row):
            self.display.say(f"diagnosis, {finding.rule}: {finding.text}")
            self.alarms += (
                [(finding.rule, finding.text)] if finding.rule in self.config.logging.alarms else []
            )

    def alarm(self) -> None:
        """Does what `logging.alarms` asks for.

        Keeps a checkpoint beside the others, or stops the run (Exhausted: it is saved).
        """
        alarms, self.alarms = self.alarms, []
        for rule, text in alarms:
            self.save()
            self.run.keep(self.run.checkpoints / f"step-{self.rollout:06d}", f"alarm-{rule}")
            if self.config.logging.alarms[rule] == "stop":
                raise Exhausted(f"logging.alarms.{rule}: {text}")

    def save(self) -> None:
        """Writes a checkpoint of the last whole rollout, unless there is one."""
        if self.saved == self.rollout:
            return
        self.display.phase(self.rollout, "checkpoint")
        state: dict[str, Any] = {
            "updates": self.learner.updates,
            "seed": self.config.seed,
            "metrics": self.latest,
        }
        state |= {"selection": self.selected, "idle": self.idle}
        self.run.save(self.rollout, state, self.learner.save)
        self.run.prune(self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)
        self.saved = self.rollout

    def _due(self, every: int) -> bool:
        return every > 0 and (
            self.rollout % every == 0 or self.rollout == self.config.train.rollouts
        )

    def _progress(self, phase: str) -> Callable[[int, int], None]:
        self.display.phase(self.rollout, phase)
        return lambda done, total: self.display.phase(self.rollout, phase, f"{done}/{total}")

    def _update_progress(self, first: bool) -> Callable[[int, int], None]:
        def show(done: int, total: int) -> None:
            # nothing of the rollout's updates is applied yet: it can be given up
            if first and ranks.count() == 1:
                self.signals.check()
            self.display.phase(self.rollout, "update", f"{done}/{total}")

        return show
