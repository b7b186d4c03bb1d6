"""Sends the learner's weights to the engine (`sync`) and checks that it holds them.

Both score the same tokens: after every sync (`probe`), and once, at the start of a run, with
visibly changed weights (`canary`).

The engine's side is what it samples with: prompts of more than one KV block, always the same, so
that a prefix cached under older weights shows too (scoring given tokens would skip the cache).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from grpo.config import Config
from grpo.engines import Engine, Request, SamplingOptions, SyncReport
from grpo.learning.batch import micro_batches
from grpo.learning.learner import Learner
from grpo.run import ranks
from grpo.run.signals import Signals
from grpo.types import Batch, GrpoError, RunError, Sample

PROMPT_TOKENS = 96  # three KV blocks on a CPU: the first two are found in the cache
# Measured gaps: 1e-6 in float32, 0.03-0.07 in bfloat16 on SmolLM2-135M.
MAX_GAP_FLOAT32 = 1e-3
MAX_GAP_ROUNDED = 0.2
CANARY_SEEDS = tuple(20_000 + 1_000 * draw for draw in range(8))
# The canary's limit is at least this times its perturbation's rounding noise ...
NOISE_FACTOR = 2.5
# ... and at most this times the probe's limit: beyond it a stale kind of weight would not show.
MAX_LIMIT_FACTOR = 2.0


class WeightMismatchError(RunError):
    """Engine and learner disagree about the same tokens; all ranks raise it alike."""

    known_to_all_ranks = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """A probe's result: `ProbeReport(gap=0.03, max_gap=0.2)`."""

    gap: float  # mean |log pi_engine - log pi_learner| over the sampled tokens
    max_gap: float  # the gap that stops the run

    def metrics(self) -> dict[str, float]:
        """Returns the `probe/` metrics."""
        return {"probe/gap": self.gap, "probe/gap_share": self.gap / self.max_gap}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """How engine and learner are compared.

    `num_tokens` are sampled per prompt at `temperature`. A gap above `max_gap` stops the run.
    `rounds`: engine or learner computes in less than float32, so they differ by rounding.
    """

    temperature: float
    num_tokens: int
    max_gap: float
    micro_batch_tokens: int
    packed: bool = False
    rounds: bool = False


def check_settings(config: Config) -> CheckSettings:
    """Returns how a run's config compares engine and learner."""
    engine_dtype = config.engine.dtype or config.model.dtype
    rounds = not engine_dtype == config.model.dtype == "float32"
    return CheckSettings(
        temperature=config.sampling.temperature,
        num_tokens=config.probe.tokens,
        max_gap=config.probe.max_gap or (MAX_GAP_ROUNDED if rounds else MAX_GAP_FLOAT32),
        micro_batch_tokens=config.learner.micro_batch_tokens,
        packed=config.model.packed,
        rounds=rounds,
    )


class WeightCheck:
    """Compares the logprobs of engine and learner on tokens that the engine samples."""

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        prompts: Sequence[tuple[int, ...]],
        settings: CheckSettings,
    ) -> None:
        """`prompts`: token ids, see `probe_prompts`."""
        self._engine = engine
        self._learner = learner
        self._settings = settings
        self._requests = [Request(prompt_ids=ids, seed=i) for i, ids in enumerate(prompts)]
        self._options = SamplingOptions(
            max_tokens=settings.num_tokens, temperature=settings.temperature, ignore_eos=True
        )

    def gap(self) -> float:
        """Returns the mean |log pi_engine - log pi_learner| over the sampled tokens.

        With several copies of the model it returns the largest mean, or NaN if one is NaN.
        """
        samples = self._sampled()
        batches = self._batches(samples)
        local_gaps: dict[int, list[float]] = {}
        for batch, score in zip(batches, self._learner.score(batches), strict=True):
            if batch.idle:
                continue
            differences = (score.logprobs - batch.sampler_logprobs).abs()  # [B, T]
            for row, i in enumerate(batch.index):
                local = differences[row][batch.token_mask[row]]
                local_gaps.setdefault(samples[i].group, []).extend(local.tolist())
        gaps: dict[int, list[float]] = {}
        for part in ranks.all_gather("the probe of the other ranks", local_gaps):
            for copy, values in part.items():
                gaps.setdefault(copy, []).extend(values)
        means = [sum(values) / len(values) for values in gaps.values()]
        if any(math.isnan(mean) for mean in means):
            return math.nan
        return max(means)

    def _sampled(self) -> list[Sample]:
        """Returns what every copy of the model samples; a sample's group is its copy's number."""
        copies_of_ranks = ranks.all_gather_or_raise(
            "the probe's samples", lambda: self._engine.prove(self._requests, self._options)
        )
        copies = [rows for copies_of_rank in copies_of_ranks for rows in copies_of_rank]
        samples = []
        for copy, rows in enumerate(copies):
            for request, (completion,) in zip(self._requests, rows, strict=True):
                samples.append(
                    Sample(
                        token_ids=request.prompt_ids + completion.token_ids,
                        prompt_length=len(request.prompt_ids),
                        advantages=(0.0,) * len(completion.token_ids),
                        sampler_logprobs=completion.logprobs,
                        group=copy,
                    )
                )
        return samples

    def canary(self, version: int, signals: Signals | None = None) -> float:
        """Sends visibly perturbed weights through the real sync and returns the gap.

        The caller must send the true ones next. Raises WeightMismatchError.

        A head, a layer or a kind of weight that does not arrive shows here, where one small
        optimizer step would hide it.
        """
        seed, noise = self._quiet_perturbation()
        with self._learner.perturbed(seed):
            sync(self._engine, self._learner, version, signals)
            gap = self.gap()
        limit = max(self._settings.max_gap, NOISE_FACTOR * noise)
        limit = min(limit, MAX_LIMIT_FACTOR * self._settings.max_gap)
        _require(
            gap,
            limit,
            "the canary",
            "a weight does not arrive in the engine, or arrives in the wrong place",
        )
        return gap

    def _quiet_perturbation(self) -> tuple[int, float]:
        """Returns the seed of a perturbation under which rounding changes little, and the noise.

        The noise is how much rounding changes a logprob.

        In bfloat16 some perturbations make a model so sensitive that two right implementations
        disagree: on SmolLM2-135M the noise of twelve of them lay between 0.03 and 0.7, where a
        stale kind of weight shows as 0.2 to 2.
        """
        if not self._settings.rounds:
            return CANARY_SEEDS[0], 0.0
        best_seed = CANARY_SEEDS[0]
        min_noise = math.inf
        for seed in CANARY_SEEDS:
            noise = self._rounding_noise(seed)
            if noise < min_noise:
                best_seed = seed
                min_noise = noise
            if NOISE_FACTOR * min_noise <= self._settings.max_gap:
                break
        return best_seed, min_noise if math.isfinite(min_noise) else 0.0

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
        local: list[float] = []
        for batch, score, jittered_score in zip(batches, before, after, strict=True):
            if not batch.idle:
                difference = (score.logprobs - jittered_score.logprobs)[batch.token_mask]
                local += difference.abs().tolist()
        gathered = ranks.all_gather("the canary's noise", local)
        differences = [value for part in gathered for value in part]
        return sum(differences) / len(differences)

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        return micro_batches(
            samples,
            [0.0] * len(samples),
            max_tokens=self._settings.micro_batch_tokens,
            packed=self._settings.packed,
            share=self._learner.share,
        )

    def probe(self) -> ProbeReport:
        """Returns the gap after a sync. Raises WeightMismatchError if it is above the limit."""
        gap = self.gap()
        _require(
            gap,
            self._settings.max_gap,
            "the probe",
            "stale or wrong weights in the engine, or a stale prefix cache",
        )
        return ProbeReport(gap=gap, max_gap=self._settings.max_gap)


def _require(gap: float, limit: float, check: str, meaning: str) -> None:
    """Raises WeightMismatchError for a gap above the limit, or that is NaN."""
    if gap <= limit:
        return
    raise WeightMismatchError(
        f"{check} found that engine and learner disagree: mean |difference of logprobs| {gap:.4g}, "
        f"allowed {limit:.3g}. Either {meaning}, or this model's low-precision noise is larger: "
        "see probe.max_gap, or try engine.dtype=float32"
    )


def sync(
    engine: Engine, learner: Learner, version: int, signals: Signals | None = None
) -> SyncReport:
    """Sends the learner's weights to the engine under a version, which it acknowledges.

    All ranks call it together, each for its own engine. With several ranks `signals` interrupt none
    of them before all are through, and an error of one rank ends the job (BrokenExchangeError): the
    others are in an exchange that it has left.
    """
    if ranks.world_size() == 1:
        return engine.load_weights(learner.weights(), version)
    held = signals.held() if signals is not None else contextlib.nullcontext()
    try:
        with held:
            report = engine.load_weights(learner.weights(), version)
    except GrpoError as error:
        raise ranks.BrokenExchangeError(str(error)) from None
    except Exception as error:
        raise ranks.BrokenExchangeError(f"{type(error).__name__}: {error}") from error
    reports = ranks.all_gather("the weight sync of the other ranks", report)
    return replace(reports[0], seconds=max(each.seconds for each in reports))


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
