"""`grpo collect`: rejection sampling.

A model samples completions; those that are correct, well-formed and readable are kept as traces in
traces.jsonl. The problems are sampled in chunks. Each chunk is written to samples/, with the reason
for every completion that was dropped, and a written chunk is not sampled again after a resume.

Source: DeepSeek-R1 2501.12948 section 2.3.3.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo import json_lines
from grpo.config import CollectConfig, CollectSettings, DataSettings
from grpo.experience.group_metrics import group_metrics, sample_rows
from grpo.experience.prompts import Prompts
from grpo.experience.scoring import score
from grpo.rewards import format, language, repetition
from grpo.run.directory import write_file
from grpo.stages.problems import load_problems, make_mixture
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import Rewards, Sampler, check_rewards, load_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, ScoredGroup

if TYPE_CHECKING:
    from grpo.data.common.mixture import Mixture

# A Han character, or a run of letters and digits.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+")
REPETITION_NGRAM = 20  # words
MAX_DRAWS_PER_PROBLEM = 10


def collect(config: CollectConfig, *, resume: bool) -> None:
    """Samples completions and writes traces.jsonl, which `data: {name: traces}` reads.

    Raises:
        UserError: The config, the data or a path is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run. Finished chunks are kept.
    """
    require_one_rank("collect")
    settings = config.collect
    total = math.ceil(settings.problems / settings.chunk)
    with open_stage(config, "collect", total=total, unit="chunk", resume=resume) as context:
        with context.loading_problems():
            workers, rewards = load_rewards(config)
            context.stack.callback(workers.close)
            problems = load_problems(
                config.data, "train", config.seed, config.rewards, context.display.say
            )
            excluded_ngrams = _excluded_ngrams(config)
        sampler = Sampler(config, context, config.teacher)
        mixture = make_mixture(config.data, problems, sampler.prompts, config.seed)
        candidates = _first_problems(mixture, settings.problems)
        uncontaminated = [
            problem
            for problem in candidates
            if not ngrams(problem.question, settings.ngram) & excluded_ngrams
        ]
        sampler.start()
        num_done = 0
        if resume:
            num_done = max((row["step"] for row in context.run.read_metrics()), default=0)
        collector = ChunkCollector(config=config, context=context, sampler=sampler, rewards=rewards)
        collector.sample_chunks(uncontaminated, num_done)
        num_contaminated = len(candidates) - len(uncontaminated)
        counts = _write_traces(context, num_contaminated)
        context.run.update_manifest(traces="traces.jsonl", counts=counts)
        context.display.say(", ".join(f"{name} {count}" for name, count in counts.items()))


@dataclass(frozen=True, kw_only=True)
class ChunkCollector:
    """Samples, scores and records the problems of a run, one chunk after the other."""

    config: CollectConfig
    context: RunContext
    sampler: Sampler
    rewards: Rewards

    def sample_chunks(self, problems: Sequence[Problem], num_done: int) -> None:
        """Samples all chunks except the first `num_done`, which are on disk already."""
        size = self.config.collect.chunk
        self.context.run.remove_after(num_done)
        self.context.display.begin(num_done)
        for index in range(num_done, math.ceil(len(problems) / size)):
            self.context.signals.raise_if_received()
            scored = self._sample(problems[index * size : (index + 1) * size], index)
            self._record(scored, index + 1)

    def _sample(self, chunk: Sequence[Problem], index: int) -> list[ScoredGroup]:
        groups = self.sampler.sample(
            chunk,
            self.config.collect.samples,
            self.config.sampling.temperature,
            functools.partial(_show_progress, self.context, index),
        )
        return score(groups, self.rewards, self.sampler.prompts.reward_prompt)

    def _record(self, scored: Sequence[ScoredGroup], num_done: int) -> None:
        """Writes the completions of a chunk, with their drop reasons, and its metrics."""
        reasons = drop_reasons(scored, self.config.collect)
        rows = sample_rows(scored)
        for row, reason in zip(rows, reasons, strict=True):
            row["dropped"] = reason
        self.context.run.write_samples(f"chunk-{num_done:06d}", rows)
        metrics = {
            "step": num_done,
            **group_metrics(scored),
            "trace/kept": sum(not reason for reason in reasons),
        }
        self.context.record(metrics)
        self.context.display.row(metrics)


def _show_progress(context: RunContext, chunk_index: int, num_finished: int, total: int) -> None:
    context.display.phase(chunk_index, "sampling", f"{num_finished}/{total}")


def _first_problems(mixture: Mixture, count: int) -> list[Problem]:
    """Returns the first `count` different problems of a mixture, or all if it has fewer.

    A mixture is endless and repeats its problems, so the search ends after
    `MAX_DRAWS_PER_PROBLEM` positions per problem.
    """
    problems: dict[str, Problem] = {}
    for position in range(MAX_DRAWS_PER_PROBLEM * count):
        problem = mixture[position]
        problems.setdefault(problem.id, problem)
        if len(problems) == count:
            break
    return list(problems.values())


def drop_reasons(groups: Sequence[ScoredGroup], settings: CollectSettings) -> list[str]:
    """Returns why each completion is dropped, in order; "" if it is kept as a trace.

    At most `settings.keep` completions are kept per problem, the shortest ones.
    """
    reasons: list[str] = []
    for scored in groups:
        reasons += _drop_reasons_of_group(scored, settings)
    return reasons


def _drop_reasons_of_group(scored: ScoredGroup, settings: CollectSettings) -> list[str]:
    completions = scored.group.completions
    reasons = [_fault(scored, index, settings) for index in range(len(completions))]

    def num_tokens(index: int) -> int:
        return len(completions[index].token_ids)

    seen_texts: set[str] = set()
    num_kept = 0
    for index in sorted(range(len(completions)), key=num_tokens):
        text = " ".join(completions[index].text.split())
        if not reasons[index]:
            if text in seen_texts:
                reasons[index] = "duplicate"
            elif num_kept == settings.keep:
                reasons[index] = "over keep"
            else:
                num_kept += 1
        seen_texts.add(text)
    return reasons


def _fault(scored: ScoredGroup, index: int, settings: CollectSettings) -> str:
    """Returns the first fault of a completion, "" if it has none."""
    completion = scored.group.completions[index]
    if completion.finish_reason == "length":
        return "cut off"
    if settings.right and scored.rewards[index] is None:
        return "undecided"
    if settings.right and not _is_correct(scored, index):
        return "wrong"
    if settings.format and not format.check(completion.text):
        return "not well-formed"
    num_tokens = len(completion.token_ids)
    if num_tokens < settings.min_tokens:
        return "too short"
    if settings.max_tokens is not None and num_tokens > settings.max_tokens:
        return "too long"
    if _share_in_language_of_question(scored, index) < settings.language:
        return "language"
    if repetition.repeated_share(completion.text, REPETITION_NGRAM) > settings.repetition:
        return "repetition"
    return ""


def _is_correct(scored: ScoredGroup, index: int) -> bool:
    """Returns whether a completion's verdict is correct, or without a verdict its reward > 0."""
    verdict = scored.verdicts[index]
    if verdict is not None:
        return verdict.value == "correct"
    reward = scored.rewards[index]
    return reward is not None and reward > 0


def _share_in_language_of_question(scored: ScoredGroup, index: int) -> float:
    """Returns the share of a completion's thoughts in the language of the question."""
    group = scored.group
    return language.reward(group.completions[index], group.problem)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Returns the n-grams of a text's lower-cased words. A text of fewer words is one n-gram.

    `ngrams("Add 2 and 3.", 3)` -> `{("add", "2", "and"), ("2", "and", "3")}`.
    """
    words = [word.lower() for word in WORD.findall(text)]
    num_starts = max(1, len(words) - n + 1)
    return {tuple(words[start : start + n]) for start in range(num_starts)}


def _evaluation_sets(config: CollectConfig) -> DataSettings | None:
    """Returns the evaluation sets that the traces must not overlap, None if there are none."""
    if not config.collect.decontaminate:
        return None
    return DataSettings(mixture=config.collect.decontaminate, path=config.data.shared_path)


def _excluded_ngrams(config: CollectConfig) -> set[tuple[str, ...]]:
    """Returns the n-grams of all questions in the evaluation sets that traces must not overlap."""
    evaluation_sets = _evaluation_sets(config)
    if evaluation_sets is None:
        return set()
    excluded_ngrams: set[tuple[str, ...]] = set()
    for problems in load_problems(evaluation_sets, "test", config.seed).values():
        for problem in problems:
            excluded_ngrams |= ngrams(problem.question, config.collect.ngram)
    return excluded_ngrams


def _write_traces(context: RunContext, num_contaminated: int) -> dict[str, int]:
    """Writes traces.jsonl from the samples of all chunks.

    Returns:
        The number of traces, of completions by drop reason, and of contaminated problems:
        `{"kept": 40, "contaminated problems": 2, "wrong": 18, "too long": 4}`.
    """
    counts: Counter[str] = Counter({"kept": 0, "contaminated problems": num_contaminated})
    num_traces: Counter[str] = Counter()  # by problem
    traces = []
    for file in sorted(context.run.samples.glob("chunk-*.jsonl")):
        for row in json_lines.read_objects(file):
            if row["dropped"]:
                counts[row["dropped"]] += 1
                continue
            counts["kept"] += 1
            problem_id = row["problem"]
            trace = _trace(row, num_traces[problem_id])
            num_traces[problem_id] += 1
            traces.append(trace)
    write_file(context.run.path / "traces.jsonl", json_lines.to_lines(traces))
    return dict(counts)


def _trace(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns a row of samples/ as a trace. `number` counts the traces of its problem from 0."""
    return {
        "id": f"{row['problem']}#{number}",
        "question": row["question"],
        "answer": row["answer"],
        "solution": row["completion"],
        "tokens": row["tokens"],
        "source": "collect",
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["completion"]},
        ],
    }


class _CollectStage:
    command = "collect"
    config_class = CollectConfig
    sections = ("collect",)

    def run(self, config: CollectConfig, *, resume: bool) -> None:
        collect(config, resume=resume)

    def batch_arithmetic(self, config: CollectConfig) -> str:
        settings = config.collect
        num_completions = settings.problems * settings.samples
        max_sampled_tokens = num_completions * config.sampling.max_tokens
        source = config.teacher.url if config.teacher else "model.path"
        return (
            f"chunk       {settings.chunk} problems x {settings.samples} completions, at most "
            f"{settings.keep} kept per problem\n"
            f"run         {settings.problems:,} problems, {num_completions:,} completions, at most "
            f"{max_sampled_tokens:,} tokens, sampled from {source}"
        )

    def needs(self, config: CollectConfig) -> StageNeeds:
        settings = config.collect
        num_completions = settings.problems * settings.samples
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data,
                num_training=settings.problems,
                excluded=_evaluation_sets(config),
                overlap_words=settings.ngram,
                overlap_remedy="none needed: grpo collect skips these problems",
            ),
            memory=MemoryNeeds(engine=True, max_sequences=settings.chunk * settings.samples),
            disk=DiskNeeds(sampled_tokens=num_completions * config.sampling.max_tokens),
            rewards=tuple(config.rewards),
            endpoint=config.teacher,
        )

    def parts(self, config: CollectConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config: CollectConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: CollectConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[CollectConfig] = _CollectStage()
