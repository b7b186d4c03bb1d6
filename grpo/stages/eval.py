"""`grpo eval`: evaluates a model on held-out problems, and compares two evaluations.

The prompts and rewards come from a train config; an evaluation protocol can set how completions are
sampled.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grpo import config as configs
from grpo import json_lines
from grpo.config import EvalConfig
from grpo.config.reading import read_yaml
from grpo.experience.group_metrics import mean, sample_rows
from grpo.experience.prompts import Prompts
from grpo.experience.scoring import score
from grpo.learning import models
from grpo.metrics import statistics
from grpo.rewards.verifier.parse import final_answer
from grpo.run.directory import write_file
from grpo.stages.final_model import final_model_path
from grpo.stages.problems import load_problems, select_held_out
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import Rewards, Sampler, check_rewards, load_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, UserError

Row = Mapping[str, Any]  # a completion in samples/
PassRates = dict[str, float]  # by problem id

# Metrics in table.md, in addition to pass@k and maj@n. table.json has all metrics.
TABLE_METRICS = (
    "accuracy",
    "accuracy/low",
    "accuracy/high",
    "format",
    "undecided",
    "completion/truncated",
    "completion/length",
    "length/right",
    "length/wrong",
)
MAX_LISTED_CHANGES = 8  # problems that `compare` lists per direction
# Completions per problem with eval.protocol=r1. DeepSeek-R1 samples 4 to 64, depending on the size
# of the set (2501.12948 section 3).
R1_SMALL_SET = 100
R1_SAMPLES_SMALL_SET = 64
R1_SAMPLES = 16


def evaluate(config: EvalConfig, *, resume: bool) -> None:
    """Writes `eval/` metrics, all completions, table.md and table.json into the run directory.

    Raises:
        UserError: The config, the data or the model is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run. Finished chunks are kept.
    """
    require_one_rank("eval")
    config = config.with_protocol()
    if not config.endpoint:
        config = with_final_model(config)
    sets = config.evaluation_sets
    with open_stage(config, "eval", total=len(sets), unit="evaluation", resume=resume) as context:
        with context.loading_problems():
            workers, rewards = load_rewards(config)
            context.stack.callback(workers.close)
            problems = {
                name: load_problems(data, "test", config.seed, config.rewards, context.display.say)
                for name, data in sets.items()
            }
        sampler = Sampler(config, context, config.endpoint)
        write_file(context.run.metrics, "")  # one row is written at the end, also after a resume
        context.display.begin(0)
        metrics: dict[str, float] = {}
        table: dict[str, dict[str, float]] = {}
        for num_done, (name, data) in enumerate(sets.items()):
            held_out = select_held_out(data, problems[name], sampler.prompts, config.eval.problems)
            evaluation = Evaluation(
                config=config,
                context=context,
                sampler=sampler,
                rewards=rewards,
                set_name=name,
                num_done=num_done,
            )
            rows = evaluation.rows(held_out)
            sampled_metrics = evaluation_metrics([row for row in rows if not row["greedy"]])
            greedy_rows = [row for row in rows if row["greedy"]]
            prefix = f"eval/{name}/" if name else "eval/"
            table[name or "all"] = sampled_metrics
            metrics.update(_with_prefix(prefix, sampled_metrics))
            if greedy_rows:
                metrics.update(_with_prefix(f"{prefix}greedy/", evaluation_metrics(greedy_rows)))
        _write_results(context, metrics, table)


def _write_results(
    context: RunContext, metrics: Mapping[str, float], table: Mapping[str, Mapping[str, float]]
) -> None:
    context.record({"step": 0, **metrics})
    write_file(context.run.path / "table.json", json.dumps(table, indent=2) + "\n")
    write_file(context.run.path / "table.md", markdown_table(table) + "\n")
    for key, value in metrics.items():
        context.display.say(f"{key.removeprefix('eval/'):32} {value:.3f}")


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

    config: EvalConfig
    context: RunContext
    sampler: Sampler
    rewards: Rewards
    set_name: str  # "" if the only set has no name
    num_done: int  # finished sets

    def rows(self, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        """Returns the rows of all completions and writes them to samples/eval-NAME.jsonl."""
        folder = self.context.run.samples
        label = self.set_name or "000000"
        samples_file = folder / f"eval-{label}.jsonl"
        chunk_size = self.config.chunk
        passes = self._passes(len(problems))
        chunk_files = []
        for number, start in enumerate(range(0, len(problems), chunk_size)):
            chunk_file = folder / f"part-{label}-{number:06d}.jsonl"
            chunk_files.append(chunk_file)
            if samples_file.exists() or chunk_file.exists():
                continue
            progress = f"{self.set_name} {start}/{len(problems)}".strip()
            rows = self._sample(problems[start : start + chunk_size], passes, progress)
            self.context.run.write_samples(chunk_file.stem, rows)
        if not samples_file.exists():
            texts = [file.read_text(encoding="utf-8") for file in chunk_files]
            write_file(samples_file, "".join(texts))
        for chunk_file in chunk_files:
            chunk_file.unlink(missing_ok=True)
        return json_lines.read_objects(samples_file)

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
        self, problems: Sequence[Problem], passes: Sequence[SamplingPass], progress: str
    ) -> list[dict[str, Any]]:
        """Returns a row per completion of a chunk. `greedy` marks the additional greedy pass."""
        rows = []
        for temperature, group_size in passes:
            self.context.signals.raise_if_received()
            on_progress = partial(_show_progress, self.context, self.num_done, progress)
            groups = self.sampler.sample(problems, group_size, temperature, on_progress)
            scored = score(groups, self.rewards, self.sampler.prompts.reward_prompt)
            is_greedy = len(passes) > 1 and temperature == 0
            for row in sample_rows(scored):
                row["greedy"] = is_greedy
                rows.append(row)
        return rows


def _show_progress(
    context: RunContext, num_done_sets: int, part: str, num_finished: int, total: int
) -> None:
    context.display.phase(num_done_sets, "sampling", f"{part}, {num_finished}/{total}")


def evaluation_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the metrics of completions.

    The accuracy is the mean over problems of the share of correct completions (pass@1), with its
    95 % interval over problems. An undecided completion counts as wrong; `undecided` is the share
    of these. With n > 1 completions per problem, pass@k for k = 1, 2, 4, ... <= n and maj@n are
    added. `length/right` and `length/wrong` are the mean lengths of correct and of all other
    completions, in tokens. If a completion has no verdict, the metrics are the means of the rewards
    and lengths, and the share of truncated completions.

    Args:
        rows: The completions as rows of samples/, at least one.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    truncated = [float(row["finish_reason"] == "length") for row in rows]
    metrics = {
        "mean": mean(rewards),
        "completion/length": mean([row["tokens"] for row in rows]),
        "completion/truncated": mean(truncated),
    }
    for name in rows[0]["parts"]:
        metrics[name] = mean([row["parts"][name] for row in rows if row["parts"][name] is not None])
    if any(row["verdict"] is None for row in rows):
        return metrics
    metrics.update(_accuracy(rows))
    metrics["undecided"] = mean([float(row["verdict"] == "undecided") for row in rows])
    correct_lengths = [float(row["tokens"]) for row in rows if row["verdict"] == "correct"]
    if correct_lengths:
        metrics["length/right"] = mean(correct_lengths)
    wrong_lengths = [float(row["tokens"]) for row in rows if row["verdict"] != "correct"]
    if wrong_lengths:
        metrics["length/wrong"] = mean(wrong_lengths)
    return metrics


def _accuracy(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the accuracy with its interval, and with several completions pass@k and maj@n."""
    groups: dict[str, list[Row]] = defaultdict(list)  # by problem id
    for row in rows:
        groups[row["problem"]].append(row)
    is_correct = [[row["verdict"] == "correct" for row in group] for group in groups.values()]
    pass_rates = [sum(group) / len(group) for group in is_correct]
    low, high = statistics.bootstrap_interval(pass_rates)
    metrics = {"accuracy": mean(pass_rates), "accuracy/low": low, "accuracy/high": high}
    min_group_size = min(len(group) for group in is_correct)
    if min_group_size == 1:
        return metrics
    k = 1
    while k <= min_group_size:
        values = [statistics.pass_at_k(len(group), sum(group), k) for group in is_correct]
        metrics[f"pass@{k}"] = mean(values)
        k *= 2
    majorities = []
    for group, is_correct_in_group in zip(groups.values(), is_correct, strict=True):
        answers = [final_answer(row["completion"]) for row in group]
        majorities.append(statistics.majority_accuracy(answers, is_correct_in_group))
    metrics[f"maj@{min_group_size}"] = mean(majorities)
    return metrics


def markdown_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table with a row per set and a column per metric of `TABLE_METRICS`.

    Args:
        table: The metrics by set: `{"aime": {"accuracy": 0.5}, "amc": {"accuracy": 0.75}}`.
    """
    columns: list[str] = []
    for metrics in table.values():
        for key in metrics:
            is_column = key in TABLE_METRICS or key.startswith(("pass@", "maj@"))
            if is_column and key not in columns:
                columns.append(key)
    lines = ["| set | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, metrics in table.items():
        cells = [_cell(key, metrics.get(key)) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if "length" in key:
        return f"{value:.1f}"
    return f"{value:.1%}"


def ask(model: str, question: str) -> None:
    """Prints a model's thoughts and answer for one problem. Sampling is greedy.

    Args:
        model: A run directory, a model directory or a hub id. For a run, its dtype and its prompt,
            sampling and engine settings are used too.
        question: The text of the problem.
    """
    require_one_rank("ask")
    with tempfile.TemporaryDirectory(prefix="grpo-ask-") as scratch:
        config = _ask_config(model, Path(scratch))
        with open_stage(config, "ask", total=1, unit="question", resume=False) as context:
            problem = Problem(id="asked", question=question, answer="", source="asked")
            sampler = Sampler(config, context, None)
            (group,) = sampler.sample([problem], 1, 0.0, _ignore_progress)
    thoughts, end_tag, answer = group.completions[0].text.rpartition("</think>")
    if end_tag:
        print(f"{thoughts}{end_tag}")
    print(answer.strip())


def _ask_config(model: str, scratch: Path) -> EvalConfig:
    """Returns a config to sample from `model`, with the settings of its run if it is one."""
    config_file = Path(model) / "config.yaml"
    run_tree = read_yaml(str(config_file)) if config_file.exists() else {}
    dtype = run_tree.get("model", {}).get("dtype", "bfloat16")
    if "quantize" in run_tree:
        dtype = "bfloat16"  # vLLM's int4 kernels do not support float32
    tree: dict[str, Any] = {}
    for key in ("prompt", "sampling", "engine"):
        if key in run_tree:
            tree[key] = run_tree[key]
    tree.get("prompt", {}).pop("chat_template", None)  # the model was saved with it
    if not tree:
        model_dir = models.resolve(final_model_path(model), None, scratch / "model", 0)
        has_template = models.load_tokenizer(model_dir).chat_template
        tree["prompt"] = {"template": "chat" if has_template else "plain"}
    tree["run_dir"] = f"{scratch}/run"
    tree["model"] = {"path": final_model_path(model), "dtype": dtype}
    tree["data"] = {"name": "arithmetic"}  # required, not used
    tree["logging"] = {"progress": "off"}
    return configs.parse(tree, kind=EvalConfig)


def _ignore_progress(num_finished: int, total: int) -> None:
    pass


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
        return {"": _read_pass_rates(folder, files[rollouts[-1]])}
    return {name: _read_pass_rates(folder, file) for name, file in files.items()}


def _read_pass_rates(folder: Path, file: Path) -> PassRates:
    """Returns the pass rates in a file of samples, without those of the additional greedy pass."""
    is_correct: dict[str, list[float]] = defaultdict(list)  # by problem id
    for row in json_lines.read_objects(file):
        if row["verdict"] is None:
            raise UserError(
                f"{folder}: the rewards of this evaluation return no verdicts, so there is no "
                "accuracy to compare"
            )
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


class _EvalStage:
    command = "eval"
    config_class = EvalConfig
    sections = ("sets", "endpoint")

    def run(self, config: EvalConfig, *, resume: bool) -> None:
        evaluate(config, resume=resume)

    def batch_arithmetic(self, config: EvalConfig) -> str:
        config = config.with_protocol()
        settings = config.eval
        num_samples = str(settings.samples)
        if settings.protocol == "r1":
            num_samples = (
                f"{R1_SAMPLES_SMALL_SET} (sets of at most {R1_SMALL_SET} problems) or {R1_SAMPLES}"
            )
        return (
            f"problem     {num_samples} completions of at most {config.sampling.max_tokens} tokens "
            f"at temperature {settings.temperature:g}\n"
            f"sets        {', '.join(config.sets) or 'one'}, at most {settings.problems} problems "
            "per set"
        )

    def needs(self, config: EvalConfig) -> StageNeeds:
        config = with_final_model(config.with_protocol())
        settings = config.eval
        num_sets = len(config.evaluation_sets)
        num_completions = settings.problems * num_sets * settings.samples
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                held_out=tuple(config.evaluation_sets.values()), num_held_out=settings.problems
            ),
            memory=MemoryNeeds(engine=True, max_sequences=config.train.num_completions),
            disk=DiskNeeds(sampled_tokens=num_completions * config.sampling.max_tokens),
            rewards=tuple(config.rewards),
            endpoint=config.endpoint,
        )

    def parts(self, config: EvalConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config: EvalConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: EvalConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[EvalConfig] = _EvalStage()
