"""`grpo collect`: rejection sampling.

A model samples completions; what is right, well-formed and readable is kept as traces.jsonl.

Source: DeepSeek-R1 2501.12948 section 2.3.3. Problems go chunk by chunk into samples/, each
completion with the reason why it was dropped; a chunk that is written is not sampled again.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grpo.config import Collect, CollectConfig, Data
from grpo.experience.describing import describe, sample_rows
from grpo.experience.prompts import Prompts
from grpo.experience.scoring import score
from grpo.run.directory import write_file
from grpo.stages.problems import load_problems, mixture
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import Sampler, check_rewards, load_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, ScoredGroup
from rewards import format, language, repetition

if TYPE_CHECKING:
    from data.common.mixture import Mixture

WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+")


def collect(config: CollectConfig, *, resume: bool) -> None:
    """Writes traces.jsonl, which `data: {name: traces}` reads.

    Raises UserError, RunError, Interrupted (chunks that are done are kept).
    """
    require_one_rank("collect")
    workers, rewards = load_rewards(config)
    problems = load_problems(config.data, "train", config.seed)
    excluded_ngrams = _excluded_ngrams(config)
    settings = config.collect
    total = -(-settings.problems // settings.chunk)
    with open_stage(config, "collect", total=total, unit="chunk", resume=resume) as context:
        context.stack.callback(workers.close)
        sampler = Sampler(config, context, config.teacher)
        stream = mixture(config.data, problems, sampler.prompts, config.seed)
        drawn = _first_problems(stream, settings.problems)
        clean = [
            problem
            for problem in drawn
            if not ngrams(problem.question, settings.ngram) & excluded_ngrams
        ]
        done = 0
        if resume:
            done = max((row["step"] for row in context.run.read_metrics()), default=0)
        context.run.cut(done)
        context.display.begin(done)
        for number in range(done, -(-len(clean) // settings.chunk)):
            chunk = clean[number * settings.chunk : (number + 1) * settings.chunk]
            context.signals.check()
            on_progress = functools.partial(_show, context, number)
            groups = sampler.sample(
                chunk, settings.samples, config.sampling.temperature, on_progress
            )
            scored = score(groups, rewards, sampler.prompts.for_rewards)
            _record(context, number + 1, scored, settings)
        counts = _write(context, contaminated=len(drawn) - len(clean))
        context.run.update_manifest(traces="traces.jsonl", counts=counts)
        context.display.say(", ".join(f"{name} {count}" for name, count in counts.items()))


def _record(
    context: RunContext, number: int, scored: Sequence[ScoredGroup], settings: Collect
) -> None:
    """Writes a chunk's completions, with the reason why each was dropped, and its metrics."""
    reasons = dropped(scored, settings)
    rows = [
        {**row, "dropped": reason} for row, reason in zip(sample_rows(scored), reasons, strict=True)
    ]
    context.run.write_samples(f"chunk-{number:06d}", rows)
    metrics = {
        "step": number,
        **describe(scored),
        "trace/kept": sum(not reason for reason in reasons),
    }
    context.record(metrics)
    context.display.row(metrics)


def _show(context: RunContext, number: int, done: int, total: int) -> None:
    context.display.phase(number, "sampling", f"{done}/{total}")


def _first_problems(stream: Mixture, count: int) -> list[Problem]:
    """Returns the first `count` different problems of a stream, fewer if it has no more."""
    problems: dict[str, Problem] = {}
    for position in range(10 * count):
        problem = stream[position]
        problems.setdefault(problem.id, problem)
        if len(problems) == count:
            break
    return list(problems.values())


def dropped(groups: Sequence[ScoredGroup], settings: Collect) -> list[str]:
    """Returns, for each completion in order, why it is no trace.

    The reason is "" for a completion that is kept: at most `keep` per problem, the shortest first.
    """
    reasons: list[str] = []
    for scored in groups:
        reasons += _dropped_of_group(scored, settings)
    return reasons


def _dropped_of_group(scored: ScoredGroup, settings: Collect) -> list[str]:
    completions = scored.group.completions
    reasons = [_fault(scored, i, settings) for i in range(len(completions))]
    lengths = [len(completion.token_ids) for completion in completions]
    texts: set[str] = set()
    num_kept = 0
    for i in sorted(range(len(completions)), key=lambda i: (lengths[i], i)):
        text = " ".join(completions[i].text.split())
        if not reasons[i]:
            if text in texts:
                reasons[i] = "duplicate"
            elif num_kept == settings.keep:
                reasons[i] = "over keep"
            else:
                num_kept += 1
        texts.add(text)
    return reasons


def _fault(scored: ScoredGroup, i: int, settings: Collect) -> str:
    """Returns what is wrong with completion i, "" if nothing is; the first fault counts."""
    completion, reward = scored.group.completions[i], scored.rewards[i]
    thoughts = completion.text.partition("</think>")[0].replace("<think>", "")
    length = len(completion.token_ids)
    question = scored.group.problem.question
    tests: dict[str, Callable[[], bool]] = {
        "cut off": lambda: completion.finish_reason == "length",
        "undecided": lambda: settings.right and reward is None,
        "wrong": lambda: settings.right and not _is_right(scored, i),
        "not well-formed": lambda: settings.format and not format.check(completion.text),
        "too short": lambda: length < settings.min_tokens,
        "too long": lambda: settings.max_tokens is not None and length > settings.max_tokens,
        "language": lambda: language.share(thoughts, language.of(question)) < settings.language,
        "repetition": lambda: repetition.repeated(completion.text, 20) > settings.repetition,
    }
    return next((name for name, test in tests.items() if test()), "")


def _is_right(scored: ScoredGroup, i: int) -> bool:
    """Returns whether completion i is right: by its verdict, or without one by its reward."""
    verdict = scored.verdicts[i]
    if verdict is not None:
        return verdict.value == "correct"
    return (scored.rewards[i] or 0) > 0


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Returns the runs of n words of a text; a shorter text is one run."""
    words = [word.lower() for word in WORD.findall(text)]
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def _excluded(config: CollectConfig) -> Data | None:
    """Returns the evaluation sets whose problems must not be among the traces."""
    if not config.collect.decontaminate:
        return None
    return Data(mixture=config.collect.decontaminate, path=config.data.path)


def _excluded_ngrams(config: CollectConfig) -> set[tuple[str, ...]]:
    """Returns the n-grams of all questions of the evaluation sets that traces must not overlap."""
    excluded = _excluded(config)
    if excluded is None:
        return set()
    runs: set[tuple[str, ...]] = set()
    for problems in load_problems(excluded, "test", config.seed).values():
        for problem in problems:
            runs |= ngrams(problem.question, config.collect.ngram)
    return runs


def _write(context: RunContext, contaminated: int) -> dict[str, int]:
    """Writes traces.jsonl from the samples of all chunks.

    Returns the counts of what was kept and dropped.
    """
    counts: Counter[str] = Counter({"kept": 0, "contaminated problems": contaminated})
    num_traces: Counter[str] = Counter()  # by problem
    lines = []
    for file in sorted(context.run.samples.glob("chunk-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            counts[row["dropped"] or "kept"] += 1
            if not row["dropped"]:
                problem = row["problem"]
                trace = _trace(row, num_traces[problem])
                num_traces[problem] += 1
                lines.append(json.dumps(trace, ensure_ascii=False) + "\n")
    write_file(context.run.path / "traces.jsonl", "".join(lines))
    return dict(counts)


def _trace(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Returns a completion as a line of traces.jsonl; `number` counts its problem's traces."""
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

    def arithmetic(self, config: CollectConfig) -> str:
        settings = config.collect
        num_completions = settings.problems * settings.samples
        source = config.teacher.url if config.teacher else "model.path"
        return (
            f"a chunk     {settings.chunk} problems x {settings.samples} completions, at most "
            f"{settings.keep} kept a problem\n"
            f"the run     {settings.problems:,} problems, {num_completions:,} completions, at most "
            f"{num_completions * config.sampling.max_tokens:,} tokens, from {source}"
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
                excluded=_excluded(config),
                overlap_words=settings.ngram,
                overlap_remedy="grpo collect leaves out what overlaps",
            ),
            memory=MemoryNeeds(engine=True, max_sequences=settings.chunk * settings.samples),
            disk=DiskNeeds(sampled_tokens=num_completions * config.sampling.max_tokens),
            rewards=tuple(config.rewards),
            endpoint=config.teacher,
        )

    def parts(self, config: CollectConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def preview(self, config: CollectConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: CollectConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[CollectConfig] = _CollectStage()
