"""Proof that the engine holds the learner's weights.

Both score the same tokens, after every sync, and once with a canary.

The engine's side is what it samples with: prompts of more than one KV block, always the same, so
that a prefix cached under older weights shows too (scoring given tokens would skip the cache).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from grpo.engines import Engine, Request, SamplingOptions, SyncReport
from grpo.learning.batch import micro_batches
from grpo.learning.learner import Learner
from grpo.run import ranks
from grpo.run.signals import Signals
from grpo.types import Batch, RunError, Sample

PROMPT_TOKENS = 96  # three KV blocks on a CPU: the first two are found in the cache
# in float32: 1e-6 measured; in bfloat16: 0.03-0.07 on SmolLM2-135M
MAX_GAP = {True: 1e-3, False: 0.2}
CANARY_SEEDS = tuple(20_000 + 1_000 * draw for draw in range(8))
# the canary's limit is at least this times its perturbation's rounding noise ...
NOISE_FACTOR = 2.5
# ... and at most this times the probe's limit: beyond it a stale kind of weight would not show
MOST_RAISED = 2.0


class Probe:
    """Compares the logprobs of engine and learner on tokens that the engine samples."""

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        prompts: Sequence[tuple[int, ...]],
        *,
        temperature: float,
        tokens: int,
        max_gap: float,
        micro_batch_tokens: int,
        packed: bool = False,
        rounds: bool = False,
    ) -> None:
        """`rounds`: engine or learner computes in less than float32, so they differ by rounding."""
        self._engine, self._learner = engine, learner
        self._requests = [Request(prompt_ids=ids, seed=i) for i, ids in enumerate(prompts)]
        self._options = SamplingOptions(max_tokens=tokens, temperature=temperature, ignore_eos=True)
        self._max_gap = max_gap
        self._micro_batch_tokens = micro_batch_tokens
        self._packed = packed
        self._rounds = rounds

    def gap(self) -> float:
        """Returns the mean |log pi_engine - log pi_learner| over the sampled tokens.

        With several copies of the model it returns the largest mean.
        """
        copies = ranks.together(
            "the probe's samples", lambda: self._engine.prove(self._requests, self._options)
        )
        every = [rows for of_rank in copies for rows in of_rank]
        sampled = [
            (request, row[0], copy)
            for copy, rows in enumerate(every)
            for request, row in zip(self._requests, rows, strict=True)
        ]
        samples = [
            Sample(
                token_ids=request.prompt_ids + completion.token_ids,
                prompt_length=len(request.prompt_ids),
                advantages=(0.0,) * len(completion.token_ids),
                sampler_logprobs=completion.logprobs,
                group=copy,
            )
            for request, completion, copy in sampled
        ]
        batches = self._batches(samples)
        gaps: dict[int, list[float]] = {}
        for (ours, _), batch in zip(self._learner.score(batches), batches, strict=True):
            for place, i in enumerate(() if batch.idle else batch.index):
                found = (ours[place] - batch.sampler_logprobs[place])[batch.token_mask[place]].abs()
                gaps.setdefault(samples[i].group, []).extend(found.tolist())
        whole: dict[int, list[float]] = {}
        for part in ranks.gather("the probe of the other ranks", gaps):
            for copy, values in part.items():
                whole.setdefault(copy, []).extend(values)
        means = [sum(values) / len(values) for values in whole.values()]
        return next((gap for gap in means if math.isnan(gap)), max(means))

    def canary(self, version: int, signals: Signals | None = None) -> float:
        """Sends visibly perturbed weights through the real sync and compares.

        The caller must send the true ones next. Raises RunError.

        A head, a layer or a kind of weight that does not arrive shows here, where one small
        optimizer step would hide it.
        """
        seed, noise = self._quiet_perturbation()
        with self._learner.perturbed(seed):
            sync(self._engine, self._learner, version, signals)
            gap = self.gap()
        limit = min(max(self._max_gap, NOISE_FACTOR * noise), MOST_RAISED * self._max_gap)
        self._judge(
            gap,
            "the canary",
            "a weight does not arrive in the engine, or arrives in the wrong place",
            limit,
        )
        return gap

    def _quiet_perturbation(self) -> tuple[int, float]:
        """Returns the seed of a perturbation under which rounding changes little, and the noise.

        The noise is how much rounding changes a logprob.

        In bfloat16 some perturbations make a model so sensitive that two right implementations
        disagree: on SmolLM2-135M the noise of twelve of them lay between 0.03 and 0.7, where a
        stale kind of weight shows as 0.2 to 2.
        """
        if not self._rounds:
            return CANARY_SEEDS[0], 0.0
        best_seed, least_noise = CANARY_SEEDS[0], math.inf
        for seed in CANARY_SEEDS:
            noise = self._rounding_noise(seed)
            if noise < least_noise:
                best_seed, least_noise = seed, noise
            if NOISE_FACTOR * least_noise <= self._max_gap:
                break
        return best_seed, least_noise if math.isfinite(least_noise) else 0.0

    def _rounding_noise(self, seed: int) -> float:
        """Returns the mean |difference of logprobs| when the perturbed weights are jittered.

        The learner scores the second halves of the prompts. The result is within a factor of two of
        what computing in bfloat16 does.
        """
        samples = []
        for request in self._requests:
            length = len(request.prompt_ids)
            start = length // 2
            if start:
                samples.append(
                    Sample(
                        token_ids=request.prompt_ids,
                        prompt_length=start,
                        advantages=(0.0,) * (length - start),
                    )
                )
        if not samples:  # prompts of one token
            return 0.0
        batches = self._batches(samples)
        with self._learner.perturbed(seed):
            before = self._learner.score(batches)
        with self._learner.perturbed(seed, jitter=True):
            after = self._learner.score(batches)
        differences: list[float] = []
        for batch, (one, _), (other, _) in zip(batches, before, after, strict=True):
            if not batch.idle:
                differences += (one - other)[batch.token_mask].abs().tolist()
        gathered = [
            value for part in ranks.gather("the canary's noise", differences) for value in part
        ]
        return sum(gathered) / len(gathered)

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        weights = [0.0] * len(samples)
        budget, share = self._micro_batch_tokens, self._learner.share
        return micro_batches(samples, weights, max_tokens=budget, packed=self._packed, share=share)

    def check(self) -> dict[str, float]:
        """Returns the gap after a sync, and what it is of the one that stops the run.

        Raises RunError past that.
        """
        gap = self.gap()
        self._judge(
            gap,
            "the probe",
            "stale or wrong weights in the engine, or a stale prefix cache",
            self._max_gap,
        )
        return {"probe/gap": gap, "probe/gap_share": gap / self._max_gap}

    def _judge(self, gap: float, what: str, meaning: str, limit: float) -> None:
        if not gap <= limit:
            error: Any = RunError(
                f"{what} found that engine and learner disagree: mean |difference of logprobs| "
                f"{gap:.4g}, allowed {limit:.3g}. "
                f"Either {meaning}, or this model's low-precision noise is larger: see "
                "probe.max_gap, or try engine.dtype=float32"
            )
            error.of_all = True  # the gap is the same on all ranks
            raise error


def sync(
    engine: Engine, learner: Learner, version: int, signals: Signals | None = None
) -> SyncReport:
    """Sends the learner's weights to the engine under a version, which it acknowledges.

    All ranks together, each to its own engine; none of several is interrupted by `signals` before
    all are through.
    """
    try:
        with signals.held() if signals and ranks.count() > 1 else contextlib.nullcontext():
            report = engine.load_weights(learner.weights(), version)
    except Exception as error:
        # the others are in an exchange that it has left
        raise ranks.Alone(str(error)) if ranks.count() > 1 else error from None
    reports = ranks.gather("the weight sync of the other ranks", report)
    return replace(reports[0], seconds=max(report.seconds for report in reports))


def probe_prompts(
    ids: Iterable[tuple[int, ...]], count: int, max_tokens: int
) -> list[tuple[int, ...]]:
    """Returns `count` prompts of up to PROMPT_TOKENS tokens, joined from real prompts."""
    prompts: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    length = min(PROMPT_TOKENS, max_tokens)
    for prompt in ids:
        current += prompt
        if len(current) >= length:
            prompts.append(current[:length])
            current = ()
        if len(prompts) == count:
            break
    return prompts or [current]
