"""Sends the learner's weights to the engine and checks that they arrived.

`sync_weights` sends the weights. `WeightCheck` compares the logprobs of engine and learner on the
same tokens. It runs after every sync (`probe`), and once at the start of a run with visibly
perturbed weights (`canary`).

The engine samples the tokens instead of scoring given ones, because scoring would bypass its prefix
cache and its CUDA graphs. The prompts are always the same and longer than one KV block, so the
check also detects a prefix that was cached under older weights. On a GPU, vLLM records a CUDA graph
for each size of a batch, so batches of several sizes are compared there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch

from grpo.config import TrainConfig
from grpo.engines import Engine, Request, SamplingOptions, SyncReport
from grpo.learning.batch import micro_batches
from grpo.learning.learner import Learner
from grpo.run import ranks
from grpo.run.signals import Signals
from grpo.types import Batch, Completion, GrpoError, RunError, Sample

PROMPT_TOKENS = 96  # three KV blocks of the default size on a CPU; the prefix cache can hold two
# Default limits of the gap. Measured: 1e-6 in float32, 0.03-0.07 in bfloat16 on SmolLM2-135M.
MAX_GAP_FLOAT32 = 1e-3
MAX_GAP_LOW_PRECISION = 0.2
# A gap below this share of `max_gap` is healthy, whatever the first gap was. With right weights,
# the gaps of the quickstart's runs were usually 0.002 to 0.04, up to 10 times the first one.
HEALTHY_SHARE = 0.25
# The gap of one size of batch may exceed the limit of the mean by this factor: it is a mean over
# fewer tokens, which varies more.
BATCH_SIZE_FACTOR = 2.0
CANARY_SEEDS = tuple(20_000 + 1_000 * draw for draw in range(8))
CANARY_JITTER_OFFSET = 50_000_000  # the seed of a perturbation's jitter minus its own seed
# A single draw can miss the noise of the one token that dominates a gap.
PROBE_JITTER_SEEDS = tuple(60_000_000 + 1_000 * draw for draw in range(4))
# The limit of the canary is NOISE_FACTOR times the rounding noise of its perturbation, but at least
# the probe's limit and at most MAX_LIMIT_FACTOR times that. A higher one would hide stale weights.
NOISE_FACTOR = 2.5
MAX_LIMIT_FACTOR = 2.0


class WeightMismatchError(RunError):
    """Engine and learner compute different logprobs for the same tokens. Raised on all ranks."""

    raised_on_all_ranks = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The result of a probe, for example `ProbeReport(gap=0.03, limit=0.2)`.

    Attributes:
        gap: Mean |log pi_engine - log pi_learner| over the sampled tokens; with several copies of
            the model, the largest mean.
        limit: The gap above which the run stops.
    """

    gap: float
    limit: float

    def metrics(self) -> dict[str, float]:
        """Returns the `probe/` metrics."""
        return {"probe/gap": self.gap, "probe/gap_share": self.gap / self.limit}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """How engine and learner are compared.

    Attributes:
        temperature: Sampling temperature.
        num_tokens: Number of tokens sampled per prompt.
        max_gap: The gap above which the run stops.
        max_gap_ratio: The ratio to the first gap above which the run stops, None for any ratio.
        has_cuda_graphs: Whether the engine has a CUDA graph for each size of a batch. If it has
            none, only one size is compared.
        full_batch_size: Number of sequences in a full batch, 0 for no full batches.
        micro_batch_tokens: Maximum number of tokens per micro-batch of the learner.
        packed: Whether the learner packs the samples of a prompt into one stream.
        is_low_precision: Whether engine or learner computes in less than float32, so that their
            logprobs differ by rounding.
    """

    temperature: float
    num_tokens: int
    max_gap: float
    micro_batch_tokens: int
    max_gap_ratio: float | None = None
    has_cuda_graphs: bool = False
    full_batch_size: int = 0
    packed: bool = False
    is_low_precision: bool = False


def check_settings(config: TrainConfig) -> CheckSettings:
    """Returns the settings of the weight check for a run's config."""
    engine_dtype = config.engine.dtype or config.model.dtype
    is_float32 = engine_dtype == "float32" and config.model.dtype == "float32"
    default_max_gap = MAX_GAP_FLOAT32 if is_float32 else MAX_GAP_LOW_PRECISION
    num_engines = ranks.world_size()
    if config.engine.servers:
        num_engines = config.engine.servers.count + len(config.engine.servers.urls)
    completions_per_engine = math.ceil(config.train.num_completions / num_engines)
    full_batch_size = 0
    if config.probe.full_batch_every:
        full_batch_size = min(config.engine.max_sequences, completions_per_engine)
    return CheckSettings(
        temperature=config.sampling.temperature,
        num_tokens=config.probe.tokens,
        max_gap=config.probe.max_gap or default_max_gap,
        max_gap_ratio=config.probe.max_gap_ratio,
        has_cuda_graphs=torch.cuda.is_available() and not config.engine.eager,
        full_batch_size=full_batch_size,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        packed=config.model.is_packed,
        is_low_precision=not is_float32,
    )


class _Perturbation(NamedTuple):
    """A perturbation of the learner's weights for the canary."""

    seed: int
    noise: float  # mean change of a logprob by rounding, under the perturbed weights


class Gaps(NamedTuple):
    """Mean |log pi_engine - log pi_learner| over the sampled tokens.

    With several copies of the model, each value is the largest mean. NaN if a mean is NaN.
    """

    mean: float  # over all batches
    by_batch_size: dict[int, float]  # `{1: 0.012, 4: 0.015}`


class FirstGap(NamedTuple):
    """The gap of a run's first probe, and the setting that tells which precision it belongs to."""

    gap: float
    max_gap: float


class _ProbeSamples(NamedTuple):
    """What the engines have sampled for a comparison."""

    samples: list[Sample]
    sources: list[tuple[int, int]]  # (batch size, copy of the model) by `Sample.group`


class _ProbeBatch(NamedTuple):
    """Requests that the engine decodes together."""

    requests: list[Request]
    compared: list[int]  # indices of the requests whose logprobs are compared


class WeightCheck:
    """Compares the logprobs of engine and learner on tokens that the engine samples.

    Attributes:
        first_gap: The gap of the run's first probe, None before it. A checkpoint contains it. It
            has no effect after a resume with another `max_gap`, that is with another precision.
    """

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        prompts: Sequence[tuple[int, ...]],
        settings: CheckSettings,
    ) -> None:
        """Prepares the engine's requests.

        Args:
            engine: The engine.
            learner: The learner.
            prompts: Token ids of each prompt, from `probe_prompts`.
            settings: How they are compared.
        """
        self.first_gap: FirstGap | None = None
        self._engine = engine
        self._learner = learner
        self._settings = settings
        self._requests = [
            Request(prompt_ids=prompt_ids, seed=seed) for seed, prompt_ids in enumerate(prompts)
        ]
        self._full_batch = _full_batch(prompts, settings.full_batch_size)
        self._options = SamplingOptions(
            max_tokens=settings.num_tokens, temperature=settings.temperature, ignore_eos=True
        )

    def probe(self, *, full_batch: bool = False) -> ProbeReport:
        """Compares engine and learner after a sync and returns the gap with its limit.

        Training can make a model more sensitive to rounding than it was at the first probe. If the
        gap is above the limit that follows from the first gap, the learner measures the rounding
        noise of the current weights, and the limit follows from that if it is larger.

        Args:
            full_batch: Whether to compare a full batch, too.

        Raises:
            WeightMismatchError: The gap is above the limit.
        """
        first_gap = self._valid_first_gap()
        limit = self._probe_limit(first_gap)
        sampled = self._sample(full_batch=full_batch)
        gaps = self._gaps(sampled)
        if gaps.mean > limit and self._settings.is_low_precision:
            noise = self._rounding_noise(sampled.samples, PROBE_JITTER_SEEDS)
            limit = max(limit, self._probe_limit(noise))
        _require_gaps_within(
            limit,
            BATCH_SIZE_FACTOR * self._settings.max_gap,
            gaps,
            check="the probe",
            cause="stale or wrong weights in the engine, a stale prefix cache",
        )
        if first_gap is None:
            self.first_gap = FirstGap(gap=gaps.mean, max_gap=self._settings.max_gap)
        return ProbeReport(gap=gaps.mean, limit=limit)

    def _valid_first_gap(self) -> float | None:
        """Returns the gap of the first probe if it was made with the same `max_gap`."""
        if self.first_gap is None or self.first_gap.max_gap != self._settings.max_gap:
            return None
        return self.first_gap.gap

    def _probe_limit(self, expected_gap: float | None) -> float:
        """Returns min(max_gap, max(HEALTHY_SHARE * max_gap, max_gap_ratio * expected_gap))."""
        max_gap = self._settings.max_gap
        ratio = self._settings.max_gap_ratio
        if ratio is None or expected_gap is None:
            return max_gap
        return min(max_gap, max(HEALTHY_SHARE * max_gap, ratio * expected_gap))

    def canary(self, version: int, signals: Signals | None = None) -> float:
        """Sends visibly perturbed weights through the real sync and returns the gap.

        Between two updates the weights change little, so the probe would not detect a head, a layer
        or a kind of weight that never arrives. The canary does.

        The engine holds perturbed weights afterwards: call `sync_weights` next.

        Args:
            version: The version of the perturbed weights.
            signals: As in `sync_weights`.

        Raises:
            WeightMismatchError: The gap is above the limit.
        """
        perturbation = self._least_noisy_perturbation()
        with self._learner.perturbed(perturbation.seed):
            sync_weights(self._engine, self._learner, version, signals)
            gaps = self.gaps(full_batch=True)
        limit = max(self._settings.max_gap, NOISE_FACTOR * perturbation.noise)
        limit = min(limit, MAX_LIMIT_FACTOR * self._settings.max_gap)
        _require_gaps_within(
            limit,
            BATCH_SIZE_FACTOR * limit,
            gaps,
            check="the canary",
            cause="a weight that does not arrive in the engine or is loaded into another tensor",
        )
        return gaps.mean

    def gaps(self, *, full_batch: bool = False) -> Gaps:
        """Samples all prompts together and compares the logprobs of engine and learner.

        If the engine has CUDA graphs, it first samples batches of other sizes: the first prompt
        alone, and optionally a full batch.

        Args:
            full_batch: Whether to sample a full batch. Of its sequences, as many are compared as
                there are prompts.
        """
        return self._gaps(self._sample(full_batch=full_batch))

    def _sample(self, *, full_batch: bool) -> _ProbeSamples:
        """Samples every batch with every copy of the model."""
        samples: list[Sample] = []
        sources: list[tuple[int, int]] = []
        for batch in self._probe_batches(full_batch=full_batch):
            for copy, completions in enumerate(self._sample_every_copy(batch)):
                group = len(sources)
                sources.append((len(batch.requests), copy))
                for index, completion in zip(batch.compared, completions, strict=True):
                    samples.append(_probe_sample(batch.requests[index], completion, group))
        return _ProbeSamples(samples, sources)

    def _gaps(self, sampled: _ProbeSamples) -> Gaps:
        """Compares the logprobs of engine and learner on the sampled tokens."""
        by_copy: dict[int, list[float]] = {}
        by_batch_size: dict[int, list[float]] = {}
        for group, values in self._token_gaps(sampled.samples).items():
            batch_size, copy = sampled.sources[group]
            by_copy.setdefault(copy, []).extend(values)
            by_batch_size.setdefault(batch_size, []).append(fmean(values))
        return Gaps(
            mean=_max_or_nan([fmean(values) for values in by_copy.values()]),
            by_batch_size={size: _max_or_nan(means) for size, means in by_batch_size.items()},
        )

    def _probe_batches(self, *, full_batch: bool) -> list[_ProbeBatch]:
        """Returns the batches to sample, see `gaps`."""
        num_prompts = len(self._requests)
        batches = []
        if self._settings.has_cuda_graphs:
            if full_batch and len(self._full_batch.requests) > num_prompts:
                batches.append(self._full_batch)
            batches.append(_ProbeBatch(self._requests[:1], compared=[0]))
        # A server that recovers is compared with the samples of the last batch.
        batches.append(_ProbeBatch(self._requests, compared=list(range(num_prompts))))
        return batches

    def _sample_every_copy(self, batch: _ProbeBatch) -> list[list[Completion]]:
        """Samples a batch with every copy of the model on all ranks.

        Returns:
            Per copy, the completions of the requests that are compared.
        """

        def sample() -> list[list[Completion]]:
            copies = self._engine.generate_on_every_copy(batch.requests, self._options)
            compared = []
            for groups in copies:  # one completion per request
                compared.append([groups[index][0] for index in batch.compared])
            return compared

        compared_per_rank = ranks.all_gather_or_raise("the samples of the probe", sample)
        return list(itertools.chain.from_iterable(compared_per_rank))

    def _token_gaps(self, samples: list[Sample]) -> dict[int, list[float]]:
        """Returns |log pi_engine - log pi_learner| of every token, by `Sample.group`."""
        gaps: dict[int, list[float]] = {}
        for gaps_of_rank in ranks.all_gather("the gaps of the probe", self._local_gaps(samples)):
            for group, values in gaps_of_rank.items():
                gaps.setdefault(group, []).extend(values)
        return gaps

    def _local_gaps(self, samples: list[Sample]) -> dict[int, list[float]]:
        """Returns |log pi_engine - log pi_learner| per token of this rank's samples, by group."""
        batches = self._batches(samples)
        gaps: dict[int, list[float]] = {}
        for batch, scores in zip(batches, self._learner.score(batches), strict=True):
            if batch.is_filler:
                continue
            differences = (scores.logprobs - batch.sampler_logprobs).abs()  # [B, T]
            for row, index in enumerate(batch.sample_indices):
                values = differences[row][batch.token_mask[row]].tolist()
                gaps.setdefault(samples[index].group, []).extend(values)
        return gaps

    def _least_noisy_perturbation(self) -> _Perturbation:
        """Returns the first perturbation with little rounding noise, or the least noisy of all.

        In bfloat16 some perturbations make a model so sensitive that two correct implementations
        disagree. On SmolLM2-135M the noise of twelve perturbations was 0.03 to 0.7, while a stale
        kind of weight causes a gap of 0.2 to 2.
        """
        if not self._settings.is_low_precision:
            return _Perturbation(seed=CANARY_SEEDS[0], noise=0.0)
        samples = self._prompt_samples()
        best = _Perturbation(seed=CANARY_SEEDS[0], noise=math.inf)
        for seed in CANARY_SEEDS:
            noise = self._rounding_noise(samples, [CANARY_JITTER_OFFSET + seed], perturbation=seed)
            if noise < best.noise:
                best = _Perturbation(seed=seed, noise=noise)
            if NOISE_FACTOR * best.noise <= self._settings.max_gap:
                break
        if not math.isfinite(best.noise):  # the noise of every perturbation is NaN or infinite
            return _Perturbation(seed=best.seed, noise=0.0)
        return best

    def _prompt_samples(self) -> list[Sample]:
        """Returns the prompts with their second halves as completions, without short prompts."""
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
        return samples

    def _rounding_noise(
        self, samples: list[Sample], jitter_seeds: Sequence[int], perturbation: int | None = None
    ) -> float:
        """Returns the mean |change of a logprob| when the learner's weights are jittered.

        In bfloat16, gaps with right weights were 0.5 to 3.8 times as large.

        Args:
            samples: The samples whose tokens are scored, the same on all ranks. Without samples,
                the result is 0.
            jitter_seeds: The seed of each draw.
            perturbation: The seed of the perturbation under which the noise is measured. None: the
                weights are not perturbed.
        """
        if not samples:
            return 0.0
        batches = self._batches(samples)
        with self._learner.perturbed(perturbation):
            plain_scores = self._learner.score(batches)
        local_changes: list[float] = []
        for jitter_seed in jitter_seeds:
            with self._learner.perturbed(perturbation, jitter_seed=jitter_seed):
                jittered_scores = self._learner.score(batches)
            for batch, plain, jittered in zip(batches, plain_scores, jittered_scores, strict=True):
                if not batch.is_filler:
                    changes = (plain.logprobs - jittered.logprobs)[batch.token_mask]
                    local_changes += changes.abs().tolist()
        all_changes: list[float] = []
        for changes_of_rank in ranks.all_gather("the rounding noise", local_changes):
            all_changes += changes_of_rank
        return sum(all_changes) / len(all_changes)

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        """Returns this rank's micro-batches of the samples."""
        return micro_batches(
            samples,
            [0.0] * len(samples),
            max_tokens=self._settings.micro_batch_tokens,
            packed=self._settings.packed,
            share=self._learner.micro_batch_share,
        )


def _full_batch(prompts: Sequence[tuple[int, ...]], size: int) -> _ProbeBatch:
    """Returns a batch of `size` requests: equally many of each prompt, with different seeds.

    The last request of each prompt is compared.
    """
    num_prompts = min(size, len(prompts))
    requests = []
    for seed in range(size):
        requests.append(Request(prompt_ids=prompts[seed * num_prompts // size], seed=seed))
    compared = [math.ceil(number * size / num_prompts) - 1 for number in range(1, num_prompts + 1)]
    return _ProbeBatch(requests, compared)


def _probe_sample(request: Request, completion: Completion, group: int) -> Sample:
    return Sample(
        token_ids=request.prompt_ids + completion.token_ids,
        prompt_length=len(request.prompt_ids),
        advantages=(0.0,) * len(completion.token_ids),
        sampler_logprobs=completion.logprobs,
        group=group,
    )


def _max_or_nan(values: Sequence[float]) -> float:
    """Returns the largest value, or NaN if one is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values)


def _require_gaps_within(
    limit: float, batch_size_limit: float, gaps: Gaps, *, check: str, cause: str
) -> None:
    """Raises WeightMismatchError if a gap is above its limit or NaN.

    Args:
        limit: The largest mean gap that is allowed.
        batch_size_limit: The largest gap of one size of batch that is allowed.
        gaps: The gaps.
        check: Name of the check, for the error message.
        cause: Its possible causes, for the error message.
    """
    is_within_limit = gaps.mean <= limit
    excessive = [size for size, gap in gaps.by_batch_size.items() if not gap <= batch_size_limit]
    if is_within_limit and not excessive:
        return
    listed = ", ".join(f"{size}: {gap:.4g}" for size, gap in sorted(gaps.by_batch_size.items()))
    raise WeightMismatchError(
        f"{check} found that engine and learner disagree: mean |difference of logprobs| "
        f"{gaps.mean:.4g}, allowed {limit:.3g}; by number of sequences in the batch {listed}, "
        f"allowed {batch_size_limit:.3g}. Possible causes: {cause}, or a model with more "
        "low-precision noise than the limit allows. Against noise, raise probe.max_gap and "
        "probe.max_gap_ratio, or set engine.dtype=float32."
    )


def sync_weights(
    engine: Engine, learner: Learner, version: int, signals: Signals | None = None
) -> SyncReport:
    """Sends the learner's weights to the engine, which confirms the version.

    All ranks call it together, each for its own engine. With several ranks, signals do not
    interrupt the sync on any rank, and the error of one rank ends the job, because the other ranks
    wait for it in a collective.

    Args:
        engine: The engine of this rank.
        learner: The learner.
        version: The version of the weights; rollout n is sampled with version n.
        signals: With several ranks, they are deferred until the end of the sync.

    Raises:
        EngineError: With one rank: the sync failed.
        BrokenCollectiveError: With several ranks: the sync failed on this rank.
    """
    if ranks.world_size() == 1:
        return engine.load_weights(learner.weights(), version)
    deferred = signals.deferred() if signals is not None else contextlib.nullcontext()
    try:
        with deferred:
            report = engine.load_weights(learner.weights(), version)
    except GrpoError as error:
        raise ranks.BrokenCollectiveError(str(error)) from None
    except Exception as error:
        raise ranks.BrokenCollectiveError(f"{type(error).__name__}: {error}") from error
    reports = ranks.all_gather("the weight sync", report)
    return replace(reports[0], seconds=max(each.seconds for each in reports))


def probe_prompts(
    ids: Iterable[tuple[int, ...]], count: int, max_tokens: int
) -> list[tuple[int, ...]]:
    """Returns up to `count` prompts of PROMPT_TOKENS tokens, joined from real prompts.

    If `ids` has too few tokens for one prompt, the result is one shorter prompt.

    Args:
        ids: Token ids of real prompts; can be infinite.
        count: Number of prompts.
        max_tokens: Maximum length of a prompt, if it is less than PROMPT_TOKENS.
    """
    prompts: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    length = min(PROMPT_TOKENS, max_tokens)
    for prompt_ids in ids:
        current += prompt_ids
        if len(current) >= length:
            prompts.append(current[:length])
            current = ()
        if len(prompts) == count:
            break
    return prompts or [current]
