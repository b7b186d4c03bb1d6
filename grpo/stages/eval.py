"""`grpo eval`: evaluates a model on held-out problems, and compares two evaluations.

The prompts and rewards come from the config, and may differ between the sets of an evaluation. All
sets are sampled from one engine. An evaluation protocol can set how completions are sampled.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grpo import json_lines
from grpo.config import EvalConfig
from grpo.config.stages import AVERAGE
from grpo.experience.group_metrics import mean, sample_rows
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.experience.scoring import score
from grpo.learning import models
from grpo.metrics import statistics
from grpo.run.directory import write_file
from grpo.stages.eval_table import (
    Metrics,
    Row,
    SetResult,
    average,
    evaluation_metrics,
    markdown_table,
    pass_rates,
)
from grpo.stages.eval_times import ChunkTimes, Times, cost_metrics
from grpo.stages.final_model import final_model_path
from grpo.stages.loaded_model import Model
from grpo.stages.problems import load_evaluation_sets, select_held_out
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import Rewards, Sampler, load_rewards_of_sets
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import DownloadError, Problem, UserError

PassRates = dict[str, float]  # by problem id

MAX_LISTED_CHANGES = 8  # problems that `compare` lists per direction
# Completions per problem with eval.protocol=r1. DeepSeek-R1 samples 4 to 64, depending on the size
# of the set (2501.12948 section 3).
R1_SMALL_SET = 100
R1_SAMPLES_SMALL_SET = 64
R1_SAMPLES = 16


def evaluate(config: EvalConfig, *, resume: bool) -> None:
    """Evaluates a model on all sets, prints the table and writes it into the run directory.

    The run directory has `eval/` metrics, all completions, table.md and table.json.

    Raises:
        UserError: The config, the data or the model is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run. Finished chunks are kept.
    """
    require_one_rank("eval")
    config = config.with_protocol()
    if not config.endpoint:
        config = with_final_model(config)
    set_configs = config.set_configs()
    with open_stage(
        config, "eval", total=len(set_configs), unit="evaluation", resume=resume
    ) as context:
        with context.loading_problems():
            workers, rewards = load_rewards_of_sets(set_configs)
            context.stack.callback(workers.close)
            problems = load_evaluation_sets(set_configs, context.display.say)
        sampler = Sampler(config, context, config.endpoint)
        evaluations = _evaluations(context, sampler, set_configs, problems, rewards)
        if config.sets:
            counts = [f"{each.set_name} {len(each.problems):,}" for each in evaluations]
            context.display.say(f"problems: {', '.join(counts)}")
        if not all(evaluation.is_sampled for evaluation in evaluations):
            sampler.start()
        write_file(context.run.metrics, "")  # one row is written at the end, also after a resume
        context.display.begin(0)
        metrics: Metrics = {}
        results: dict[str, SetResult] = {}
        for evaluation in evaluations:
            result, greedy_metrics = evaluation.result(sampler)
            name = evaluation.set_name
            prefix = f"eval/{name}/" if name else "eval/"
            metrics.update(_with_prefix(prefix, result.metrics))
            metrics.update(_with_prefix(f"{prefix}greedy/", greedy_metrics))
            results[name or "all"] = result
        _write_results(context, metrics, results)


def _evaluations(
    context: RunContext,
    sampler: Sampler,
    set_configs: Mapping[str, EvalConfig],
    problems: Mapping[str, Mapping[str, Sequence[Problem]]],
    rewards: Mapping[str, Rewards],
) -> list[Evaluation]:
    """Returns the evaluation of each set. All prompts are checked, and no engine is needed.

    Args:
        context: The context of the run.
        sampler: The sampler of the run.
        set_configs: The config of each set by name.
        problems: The problems of each set, by data set.
        rewards: The rewards of each set.

    Raises:
        UserError: The prompt settings of a set do not fit the model, or a prompt is too long. The
            message names the set.
    """
    evaluations = []
    for num_done, (name, config) in enumerate(set_configs.items()):
        try:
            prompts = sampler.prompts_for(config.prompt)
            held_out = select_held_out(
                config.evaluation_sets[name], problems[name], prompts, config.eval.problems
            )
        except UserError as error:
            raise UserError(f"sets.{name}: {error}" if name else str(error)) from None
        evaluation = Evaluation(
            config=config,
            context=context,
            prompts=prompts,
            problems=held_out,
            rewards=rewards[name],
            set_name=name,
            num_done=num_done,
        )
        evaluations.append(evaluation)
    return evaluations


def _write_results(context: RunContext, metrics: Metrics, results: Mapping[str, SetResult]) -> None:
    table = {name: result.metrics for name, result in results.items()}
    if len(results) > 1:
        table[AVERAGE] = average(results)
        metrics = {**metrics, **_with_prefix(f"eval/{AVERAGE}/", table[AVERAGE])}
    else:
        for key, value in metrics.items():
            context.display.say(f"{key.removeprefix('eval/'):32} {value:,.3f}")
    context.record({"step": 0, **metrics})
    write_file(context.run.path / "table.json", json.dumps(table, indent=2) + "\n")
    write_file(context.run.path / "table.md", markdown_table(table) + "\n")
    if not context.display.is_off:
        print(markdown_table(table))


def _with_prefix(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + key: value for key, value in values.items()}


def with_final_model(config: EvalConfig) -> EvalConfig:
    """Returns the config with its model.path resolved: a run directory becomes its final model.

    `model.rope` is removed if the model has this extension already, as after a training with it.
    """
    path = final_model_path(config.model.path)
    changes: dict[str, Any] = {"path": path}
    if models.has_rope(path, config.model.rope):
        changes["rope"] = None
    model = config.model.model_copy(update=changes)
    return config.model_copy(update={"model": model})


class SamplingPass(NamedTuple):
    """One pass over the problems: `SamplingPass(temperature=0.6, group_size=16)`."""

    temperature: float
    group_size: int  # completions per problem


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of one set, in chunks. A chunk on disk is not sampled again."""

    config: EvalConfig  # of the set, see `EvalConfig.set_configs`
    context: RunContext
    prompts: Prompts | ChatPrompts
    problems: Sequence[Problem]
    rewards: Rewards
    set_name: str  # "" if the only set has no name
    num_done: int  # finished sets

    @property
    def _label(self) -> str:
        """The name of the set in the names of files."""
        return self.set_name or "000000"

    @property
    def _samples_file(self) -> Path:
        return self.context.run.samples / f"eval-{self._label}.jsonl"

    @property
    def is_sampled(self) -> bool:
        """Whether all completions are on disk, as in a run that was finished before."""
        return self._samples_file.exists()

    def result(self, sampler: Sampler) -> tuple[SetResult, Metrics]:
        """Samples the missing completions; returns the results of the set and of its greedy pass.

        The metrics of the greedy pass are empty if the set has no such pass.

        Args:
            sampler: The sampler of the evaluation. Its engine must have been started, unless the
                set is sampled.
        """
        rows = self._rows(sampler.with_settings(self.config, self.prompts))
        sampled_rows = [row for row in rows if not row["greedy"]]
        greedy_rows = [row for row in rows if row["greedy"]]
        metrics = evaluation_metrics(sampled_rows)
        metrics.update(self._cost_metrics(rows))
        result = SetResult(metrics=metrics, pass_rates=pass_rates(sampled_rows))
        return result, evaluation_metrics(greedy_rows) if greedy_rows else {}

    def _cost_metrics(self, rows: Sequence[Row]) -> Metrics:
        """Returns the number of problems and tokens, the durations and the cost of the set."""
        num_tokens = sum(row["tokens"] for row in rows)
        metrics = {
            "problems": float(len(self.problems)),
            "completion/tokens": float(num_tokens),
        }
        times = self._times.total(self._label, len(self._chunk_starts))
        if times is not None:
            metrics.update(cost_metrics(num_tokens, times, self.config.price))
        return metrics

    @property
    def _times(self) -> ChunkTimes:
        return ChunkTimes(self.context.run.path / "times.json")

    @property
    def _chunk_starts(self) -> range:
        """The indices of the first problems of all chunks."""
        return range(0, len(self.problems), self.config.chunk)

    def _rows(self, sampler: Sampler) -> list[dict[str, Any]]:
        """Returns the rows of all completions and writes them to samples/eval-NAME.jsonl."""
        folder = self.context.run.samples
        passes = self._passes(len(self.problems))
        chunk_files = []
        for number, start in enumerate(self._chunk_starts):
            chunk_file = folder / f"part-{self._label}-{number:06d}.jsonl"
            chunk_files.append(chunk_file)
            if self.is_sampled or chunk_file.exists():
                continue
            progress = f"{self.set_name} {start}/{len(self.problems)}".strip()
            chunk = self.problems[start : start + self.config.chunk]
            rows, times = self._sample(sampler, chunk, passes, progress)
            self._times.record(self._label, number, times)
            self.context.run.write_samples(chunk_file.stem, rows)
        if not self.is_sampled:
            texts = [file.read_text(encoding="utf-8") for file in chunk_files]
            write_file(self._samples_file, "".join(texts))
        for chunk_file in chunk_files:
            chunk_file.unlink(missing_ok=True)
        return json_lines.read_objects(self._samples_file)

    def _passes(self, num_problems: int) -> list[SamplingPass]:
        settings = self.config.eval
        if settings.protocol == "r1":
            is_small = num_problems <= R1_SMALL_SET
            group_size = R1_SAMPLES_SMALL_SET if is_small else R1_SAMPLES
            return [SamplingPass(settings.temperature, group_size)]
        passes = [SamplingPass(settings.temperature, settings.samples)]
        if settings.temperature:
            passes.append(SamplingPass(temperature=0.0, group_size=1))
        return passes

    def _sample(
        self,
        sampler: Sampler,
        problems: Sequence[Problem],
        passes: Sequence[SamplingPass],
        progress: str,
    ) -> tuple[list[dict[str, Any]], Times]:
        """Returns a row per completion of a chunk, and the seconds of sampling and of scoring.

        `greedy` in a row marks the additional greedy pass.
        """
        rows = []
        times = {"sampling": 0.0, "scoring": 0.0}
        for temperature, group_size in passes:
            self.context.signals.raise_if_received()
            on_progress = partial(_show_progress, self.context, self.num_done, progress)
            start = time.monotonic()
            groups = sampler.sample(problems, group_size, temperature, on_progress)
            sampled = time.monotonic()
            scored = score(groups, self.rewards, self.prompts.reward_prompt)
            times["sampling"] += sampled - start
            times["scoring"] += time.monotonic() - sampled
            is_greedy = len(passes) > 1 and temperature == 0
            for row in sample_rows(scored):
                row["greedy"] = is_greedy
                rows.append(row)
        return rows, times


def _show_progress(
    context: RunContext, num_done_sets: int, part: str, num_finished: int, total: int
) -> None:
    context.display.phase(num_done_sets, "sampling", f"{part}, {num_finished}/{total}")


def ask(model: str, question: str) -> None:
    """Prints a model's thoughts and answer for one problem. Sampling is greedy.

    Args:
        model: A run directory, a model directory or a hub id. For a run, its dtype and its prompt,
            sampling and engine settings are used too.
        question: The text of the problem.
    """
    with Model(model) as loaded_model:
        completion = loaded_model.ask(question)
    thoughts, end_tag, answer = completion.text.rpartition("</think>")
    if end_tag:
        print(f"{thoughts}{end_tag}")
    print(answer.strip())


def compare(first: str, second: str) -> None:
    """Prints the accuracy of two evaluations on their common problems, and the difference, per set.

    The difference is tested with a paired bootstrap over problems. The problems with the largest
    changes are listed.

    Args:
        first: Run directory of an evaluation, or of a training run with evaluations.
        second: As `first`. The difference is second minus first.

    Raises:
        UserError: A directory has no evaluation or no verdicts, or there are no common problems.
    """
    first_rates = _pass_rates_by_set(Path(first))
    second_rates = _pass_rates_by_set(Path(second))
    if not first_rates.keys() & second_rates.keys():
        # No set name in common, for example because the evaluations of a training run have none.
        # Problems are then matched by id only.
        first_rates = {"": _merge_sets(first_rates)}
        second_rates = {"": _merge_sets(second_rates)}
    common_problems = {}  # by set
    for name in first_rates:
        rates_of_set = second_rates.get(name, {})
        problem_ids = [problem_id for problem_id in first_rates[name] if problem_id in rates_of_set]
        if problem_ids:
            common_problems[name] = problem_ids
    if not common_problems:
        raise UserError(
            f"{first} and {second} have no problem in common: evaluate both on the same data"
        )
    for name, problem_ids in common_problems.items():
        before = [first_rates[name][problem_id] for problem_id in problem_ids]
        after = [second_rates[name][problem_id] for problem_id in problem_ids]
        _print_accuracy(f"{first} {name}".strip(), before)
        _print_accuracy(f"{second} {name}".strip(), after)
        _print_difference(before, after)
        _print_largest_changes(problem_ids, before, after)


def _pass_rates_by_set(folder: Path) -> dict[str, PassRates]:
    """Returns the pass rates of an evaluation by set, or of the last evaluation of a training run.

    The name of a set is "" if it has none.
    """
    files = {
        file.stem.removeprefix("eval-"): file
        for file in sorted((folder / "samples").glob("eval-*.jsonl"))
    }
    if not files:
        raise UserError(f"{folder}: no evaluation found (samples/eval-*.jsonl)")
    rollouts = [name for name in files if name.isdecimal()]
    if rollouts:
        files = {"": files[rollouts[-1]]}
    rates = {}
    for name, file in files.items():
        rates_of_set = _read_pass_rates(file)
        if rates_of_set is not None:
            rates[name] = rates_of_set
        elif len(files) > 1:
            print(f"{folder} {name}: not compared, its rewards return no verdicts")
    if not rates:
        raise UserError(
            f"{folder}: the rewards of this evaluation return no verdicts, so there is no accuracy "
            "to compare"
        )
    return rates


def _read_pass_rates(file: Path) -> PassRates | None:
    """Returns the pass rates in a file of samples, None if a completion has no verdict.

    The additional greedy pass is left out.
    """
    is_correct: dict[str, list[float]] = defaultdict(list)  # by problem id
    for row in json_lines.read_objects(file):
        if row["verdict"] is None:
            return None
        if not row.get("greedy"):
            is_correct[row["problem"]].append(float(row["verdict"] == "correct"))
    return {problem_id: mean(values) for problem_id, values in is_correct.items()}


def _merge_sets(rates: Mapping[str, PassRates]) -> PassRates:
    merged: PassRates = {}
    for rates_of_set in rates.values():
        merged.update(rates_of_set)
    return merged


def _print_accuracy(label: str, pass_rates: Sequence[float]) -> None:
    low, high = statistics.bootstrap_interval(pass_rates)
    print(f"{label:40} {mean(pass_rates):6.1%}  [{low:.1%}, {high:.1%}]")


def _print_difference(before: Sequence[float], after: Sequence[float]) -> None:
    test = statistics.paired_comparison(before, after)
    print(
        f"second - first: {test['difference']:+.1%} [{test['low']:+.1%}, {test['high']:+.1%}], "
        f"p = {test['p']:.3g}, {len(before)} problems: better on {test['better']:.0f}, worse on "
        f"{test['worse']:.0f}, equal on {test['equal']:.0f}"
    )


def _print_largest_changes(
    problem_ids: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> None:
    changes = sorted(
        (new - old, problem_id)
        for old, new, problem_id in zip(before, after, problem_ids, strict=True)
    )
    better = [change for change in reversed(changes) if change[0] > 0]
    worse = [change for change in changes if change[0] < 0]
    for label, largest_first in (("better", better), ("worse", worse)):
        if not largest_first:
            continue
        listed = [
            f"{problem_id} {change:+.0%}"
            for change, problem_id in largest_first[:MAX_LISTED_CHANGES]
        ]
        if len(largest_first) > MAX_LISTED_CHANGES:
            listed.append("...")
        print(f"  {label}: {', '.join(listed)}")


def _arithmetic_of_set(config: EvalConfig) -> str:
    settings = config.eval
    num_samples = str(settings.samples)
    if settings.protocol == "r1":
        num_samples = (
            f"{R1_SAMPLES_SMALL_SET} (sets of at most {R1_SMALL_SET} problems) or {R1_SAMPLES}"
        )
    return (
        f"at most {settings.problems} problems, {num_samples} completions of at most "
        f"{config.sampling.max_tokens} tokens at temperature {settings.temperature:g}, scored by "
        f"{', '.join(config.rewards)}"
    )


def _max_tokens_of_set(config: EvalConfig) -> int:
    """Returns the largest number of tokens that a set can sample."""
    settings = config.eval
    num_samples = settings.samples
    if settings.protocol == "r1":
        num_samples = R1_SAMPLES if settings.problems > R1_SMALL_SET else R1_SAMPLES_SMALL_SET
    elif settings.temperature:
        num_samples += 1  # the greedy pass
    return settings.problems * num_samples * config.sampling.max_tokens


def _index_of_alike(config: EvalConfig, parts: Sequence[EvalConfig]) -> int | None:
    """Returns the index of the part with the same prompts, sampling and rewards."""
    for index, part in enumerate(parts):
        is_same_text = part.prompt == config.prompt and part.sampling == config.sampling
        if is_same_text and part.rewards == config.rewards:
            return index
    return None


def _part_name(config: EvalConfig) -> str:
    """Returns `aime24 and 5 more` for a part of six sets."""
    first, *others = config.sets
    return f"{first} and {len(others)} more" if others else first


class _EvalStage:
    command = "eval"
    config_class = EvalConfig
    sections = ("sets", "endpoint")

    def run(self, config: EvalConfig, *, resume: bool) -> None:
        evaluate(config, resume=resume)

    def batch_arithmetic(self, config: EvalConfig) -> str:
        config = config.with_protocol()
        width = max([len(name) for name in config.sets], default=len("problem"))
        lines = []
        for name, set_config in config.set_configs().items():
            lines.append(f"{name or 'problem':{width}}  {_arithmetic_of_set(set_config)}")
        return "\n".join(lines)

    def needs(self, config: EvalConfig) -> StageNeeds:
        config = with_final_model(config.with_protocol())
        set_configs = config.set_configs().values()
        num_tokens = sum(_max_tokens_of_set(set_config) for set_config in set_configs)
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                held_out=tuple(config.evaluation_sets.values()),
                num_held_out=max(each.eval.problems for each in set_configs),
            ),
            memory=MemoryNeeds(engine=True, max_sequences=config.train.num_completions),
            disk=DiskNeeds(sampled_tokens=num_tokens),
            rewards=tuple(config.rewards),
            endpoint=config.endpoint,
        )

    def parts(self, config: EvalConfig) -> list[Part]:
        """Returns a part for all sets with the same prompts, sampling and rewards."""
        parts: list[EvalConfig] = []
        for set_config in config.set_configs().values():
            part = set_config.model_copy(update={"eval": config.eval})
            index = _index_of_alike(part, parts)
            if index is None:
                parts.append(part)
            else:
                sets = {**parts[index].sets, **part.sets}
                parts[index] = part.model_copy(update={"sets": sets})
        if len(parts) == 1:
            return [Part(stage=self, config=parts[0])]
        return [Part(stage=self, config=part, name=_part_name(part)) for part in parts]

    def dry_run_lines(self, config: EvalConfig) -> list[str]:
        set_configs = config.set_configs()
        load_rewards_of_sets(set_configs)  # starts no worker
        with contextlib.suppress(DownloadError):  # the dry run reports it
            load_evaluation_sets(set_configs)
        return []

    def checks(
        self, config: EvalConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[EvalConfig] = _EvalStage()
