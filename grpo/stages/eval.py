"""`grpo eval`: judges a model on held-out problems, and compares two evaluations.

A train config's prompts and rewards, or a protocol, decide how a model is judged.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo.config import EvalConfig
from grpo.experience.describing import mean, sample_rows
from grpo.experience.prompts import Prompts
from grpo.experience.scoring import score
from grpo.learning import models
from grpo.metrics import statistics
from grpo.run.directory import write_file
from grpo.stages.final_model import final_model
from grpo.stages.problems import held_out, load_problems
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import Rewards, Sampler, check_rewards, load_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, UserError
from rewards.verifier.parse import final_answer

Row = Mapping[str, Any]
SHOWN = (
    "accuracy",
    "accuracy/low",
    "accuracy/high",
    "pass@1",
    "maj",
    "format",
    "undecided",
    "completion/truncated",
    "completion/length",
    "length/right",
    "length/wrong",
)


def eval(config: EvalConfig, *, resume: bool) -> None:
    """Writes `eval/` metrics, every completion, table.md and table.json into the run directory.

    Raises UserError, RunError, Interrupted: chunks that are done are kept.
    """
    require_one_rank("eval")
    config = config.by_protocol()
    if not config.endpoint:
        config = with_final_model(config)
    workers, rewards = load_rewards(config)
    sets = config.judged
    problems = {name: load_problems(data, "test", config.seed) for name, data in sets.items()}
    with open_stage(config, "eval", total=len(sets), unit="evaluation", resume=resume) as context:
        context.stack.callback(workers.close)
        sampler = Sampler(config, context, config.endpoint)
        write_file(context.run.metrics, "")  # one row, written at the end
        context.display.begin(0)
        metrics: dict[str, Any] = {}
        table = {}
        for done, (name, data) in enumerate(sets.items()):
            chosen = held_out(data, problems[name], sampler.prompts, config.eval.problems)
            evaluation = Evaluation(
                config=config,
                context=context,
                sampler=sampler,
                rewards=rewards,
                name=name,
                num_done=done,
            )
            rows = evaluation.rows(chosen)
            sampled = summary([row for row in rows if not row["greedy"]])
            greedy_rows = [row for row in rows if row["greedy"]]
            prefix = f"eval/{name}/" if name else "eval/"
            table[name or "all"] = sampled
            metrics |= _with_prefix(prefix, sampled)
            if greedy_rows:
                metrics |= _with_prefix(f"{prefix}greedy/", summary(greedy_rows))
        context.record({"step": 0, **metrics})
        write_file(context.run.path / "table.json", json.dumps(table, indent=2) + "\n")
        write_file(context.run.path / "table.md", markdown(table) + "\n")
        for key, value in metrics.items():
            context.display.say(f"{key.removeprefix('eval/'):32} {value:.3f}")


def _with_prefix(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + key: value for key, value in values.items()}


def with_final_model(config: EvalConfig) -> EvalConfig:
    """Returns the config with the model of the run directory, where model.path is one."""
    return config.model_copy(
        update={"model": config.model.model_copy(update={"path": final_model(config.model.path)})}
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of one set, chunk by chunk; a chunk that is written is not sampled again."""

    config: EvalConfig
    context: RunContext
    sampler: Sampler
    rewards: Rewards
    name: str  # of the set; "" if it has none
    num_done: int  # sets before this one

    def rows(self, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        """Returns the rows of all completions, and leaves them in samples/eval-NAME.jsonl."""
        folder = self.context.run.samples
        label = self.name or "000000"
        whole = folder / f"eval-{label}.jsonl"
        size = self.config.chunk
        passes = self._passes(len(problems))
        parts = []
        for number, start in enumerate(range(0, len(problems), size)):
            part = folder / f"part-{label}-{number:06d}.jsonl"
            parts.append(part)
            if whole.exists() or part.exists():
                continue
            progress = f"{self.name} {start}/{len(problems)}".strip()
            rows = self._sample(problems[start : start + size], passes, progress)
            self.context.run.write_samples(part.stem, rows)
        if not whole.exists():
            write_file(whole, "".join(part.read_text() for part in parts))
        for part in parts:
            part.unlink(missing_ok=True)
        return [json.loads(line) for line in whole.read_text().splitlines()]

    def _passes(self, num_problems: int) -> list[tuple[float, int]]:
        """Returns temperature and completions per problem, for each pass over the problems."""
        settings = self.config.eval
        if settings.protocol == "r1":
            return [(settings.temperature, 64 if num_problems <= 100 else 16)]
        passes = [(settings.temperature, settings.samples)]
        if settings.temperature:
            passes.append((0.0, 1))
        return passes

    def _sample(
        self, problems: Sequence[Problem], passes: list[tuple[float, int]], progress: str
    ) -> list[dict[str, Any]]:
        """Returns the scored completions of a chunk; `greedy` marks those of a second pass."""
        rows = []
        for temperature, count in passes:
            self.context.signals.check()
            on_progress = partial(_show_progress, self.context, self.num_done, progress)
            groups = self.sampler.sample(problems, count, temperature, on_progress)
            scored = score(groups, self.rewards, self.sampler.prompts.for_rewards)
            is_greedy = len(passes) > 1 and temperature == 0
            for row in sample_rows(scored):
                rows.append({**row, "greedy": is_greedy})
        return rows


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the metrics of completions.

    Accuracy is the mean over problems of the share that is right (pass@1), with its 95 % interval
    over problems; an undecided completion counts as wrong, and is counted. Then pass@k, maj@n, and
    length of right and wrong ones.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    cut_off = [float(row["finish_reason"] == "length") for row in rows]
    metrics = {
        "mean": mean(rewards),
        "completion/length": mean([row["tokens"] for row in rows]),
        "completion/truncated": mean(cut_off),
    }
    for name in rows[0]["parts"]:
        metrics[name] = mean([row["parts"][name] for row in rows if row["parts"][name] is not None])
    if any(row["verdict"] is None for row in rows):
        return metrics
    metrics |= _accuracy(rows)
    metrics["undecided"] = mean([float(row["verdict"] == "undecided") for row in rows])
    for name, is_right in (("right", True), ("wrong", False)):
        lengths = [
            float(row["tokens"]) for row in rows if (row["verdict"] == "correct") == is_right
        ]
        if lengths:
            metrics[f"length/{name}"] = mean(lengths)
    return metrics


def _accuracy(rows: Sequence[Row]) -> dict[str, float]:
    """Returns accuracy with its interval, and with several completions pass@k and maj@n."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row)
    right = [[row["verdict"] == "correct" for row in group] for group in groups.values()]
    shares = [sum(group) / len(group) for group in right]
    low, high = statistics.interval(shares)
    metrics = {"accuracy": mean(shares), "accuracy/low": low, "accuracy/high": high}
    num_samples = min(len(group) for group in right)
    if num_samples == 1:
        return metrics
    k = 1
    while k <= num_samples:
        values = [statistics.pass_at_k(len(group), sum(group), k) for group in right]
        metrics[f"pass@{k}"] = mean(values)
        k *= 2
    majorities = []
    for group, is_right in zip(groups.values(), right, strict=True):
        answers = [final_answer(row["completion"]) for row in group]
        majorities.append(statistics.majority(answers, is_right))
    metrics[f"maj@{num_samples}"] = mean(majorities)
    return metrics


def _show_progress(context: RunContext, done: int, part: str, ready: int, total: int) -> None:
    context.display.phase(done, "sampling", f"{part}, {ready}/{total}")


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the sets down and what is most asked for across; table.json has everything."""
    columns: list[str] = []
    for row in table.values():
        for key in row:
            is_shown = key in SHOWN or key.startswith(("pass@", "maj@"))
            if is_shown and key not in columns:
                columns.append(key)
    lines = ["| set | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in table.items():
        cells = [_cell(key, row.get(key)) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if "length" in key else f"{value:.1%}"


def ask(model: str, question: str) -> None:
    """Prints what a model thinks of a problem, and its answer.

    `model`: a run, whose prompts it takes, a directory or a hub id.
    """
    import tempfile

    from grpo import config as configs
    from grpo.config.reading import read_yaml

    require_one_rank("ask")
    file = Path(model) / "config.yaml"
    run_tree = read_yaml(str(file)) if file.exists() else {}
    dtype = run_tree.get("model", {}).get("dtype", "bfloat16")
    if "quantize" in run_tree:
        dtype = "bfloat16"  # the kernels of int4 know no other
    with tempfile.TemporaryDirectory(prefix="grpo-ask-") as scratch:
        tree: dict[str, Any] = {}
        for key in ("prompt", "sampling", "engine"):
            if key in run_tree:
                tree[key] = run_tree[key]
        if not tree:
            model_dir = models.resolve(final_model(model), None, Path(scratch) / "model", 0)
            has_template = models.load_tokenizer(model_dir).chat_template
            tree["prompt"] = {"template": "chat" if has_template else "plain"}
        tree["run_dir"] = f"{scratch}/run"
        tree["model"] = {"path": final_model(model), "dtype": dtype}
        tree["data"] = {"name": "arithmetic"}
        tree["logging"] = {"progress": "off"}
        config = configs.parse(tree, kind=EvalConfig)
        with open_stage(config, "ask", total=1, unit="question", resume=False) as context:
            problem = Problem(id="asked", question=question, answer="", source="asked")
            sampler = Sampler(config, context, None)
            (group,) = sampler.sample([problem], 1, 0.0, lambda *_: None)
    thoughts, end, answer = group.completions[0].text.rpartition("</think>")
    print(f"{thoughts}{end}\n" if end else "", answer.strip(), sep="")


def compare(first: str, second: str) -> None:
    """Prints how two evaluations of the same problems differ, set by set.

    It uses a paired bootstrap over problems, and lists the problems that changed most.
    """
    first_rates, second_rates = _rates(Path(first)), _rates(Path(second))
    if not first_rates.keys() & second_rates.keys():
        # The evaluations of a run are a set without a name: compare by problem alone.
        first_rates = {"": _all_sets(first_rates)}
        second_rates = {"": _all_sets(second_rates)}
    common = {}
    for name in first_rates:
        problems = [id for id in first_rates[name] if id in second_rates.get(name, {})]
        if problems:
            common[name] = problems
    if not common:
        raise UserError(f"{first} and {second} have no problem in common")
    for name, problems in common.items():
        before = [first_rates[name][problem] for problem in problems]
        after = [second_rates[name][problem] for problem in problems]
        for folder, rates in ((first, before), (second, after)):
            low, high = statistics.interval(rates)
            print(f"{f'{folder} {name}'.strip():40} {mean(rates):6.1%}  [{low:.1%}, {high:.1%}]")
        _print_difference(problems, before, after)


def _all_sets(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the pass rates of all sets by problem."""
    all_rates: dict[str, float] = {}
    for rates_of_set in rates.values():
        all_rates.update(rates_of_set)
    return all_rates


def _print_difference(
    problems: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> None:
    test = statistics.paired(before, after)
    print(
        f"second less first: {test['difference']:+.1%} [{test['low']:+.1%}, "
        f"{test['high']:+.1%}], p = {test['p']:.3g}, "
        f"{len(problems)} problems: better on {test['better']:.0f}, worse on "
        f"{test['worse']:.0f}, equal on {test['equal']:.0f}"
    )
    changes = sorted(
        (new - old, problem)
        for old, new, problem in zip(before, after, problems, strict=True)
        if old != new
    )
    better = [change for change in reversed(changes) if change[0] > 0]
    worse = [change for change in changes if change[0] < 0]
    for label, largest in (("better", better), ("worse", worse)):
        if largest:
            listed = ", ".join(f"{problem} {change:+.0%}" for change, problem in largest[:8])
            print(f"  {label}: {listed}{', ...' if largest[8:] else ''}")


def _rates(folder: Path) -> dict[str, dict[str, float]]:
    """Returns, set by set, the pass rate of each problem.

    The samples are those of an evaluation, or the last ones of a run. Greedy samples are left out
    where there are others.
    """
    files = {
        file.stem.removeprefix("eval-"): file
        for file in sorted((folder / "samples").glob("eval-*.jsonl"))
    }
    if not files:
        raise UserError(f"{folder}: no evaluation in it (samples/eval-*.jsonl)")
    numbered = [name for name in files if name.isdecimal()]
    if numbered:
        return {"": _rates_of_file(folder, files[numbered[-1]])}
    return {name: _rates_of_file(folder, file) for name, file in files.items()}


def _rates_of_file(folder: Path, file: Path) -> dict[str, float]:
    verdicts: dict[str, list[float]] = defaultdict(list)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["verdict"] is None:
            raise UserError(
                f"{folder}: its rewards give no verdicts, there is no accuracy to compare"
            )
        if not row.get("greedy"):
            verdicts[row["problem"]].append(float(row["verdict"] == "correct"))
    return {problem: mean(values) for problem, values in verdicts.items()}


class _EvalStage:
    command = "eval"
    config_class = EvalConfig
    sections = ("sets", "endpoint")

    def run(self, config: EvalConfig, *, resume: bool) -> None:
        eval(config, resume=resume)

    def arithmetic(self, config: EvalConfig) -> str:
        config = config.by_protocol()
        settings = config.eval
        samples = str(settings.samples)
        if settings.protocol == "r1":
            samples = "64 (sets of at most 100 problems) or 16"
        return (
            f"a problem   {samples} completions of at most {config.sampling.max_tokens} tokens at "
            f"temperature {settings.temperature:g}\n"
            f"the sets    {', '.join(config.sets) or 'one'}, at most {settings.problems} problems "
            "each"
        )

    def needs(self, config: EvalConfig) -> StageNeeds:
        config = with_final_model(config.by_protocol())
        settings = config.eval
        num_completions = settings.problems * (len(config.sets) or 1) * settings.samples
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                held_out=tuple(config.judged.values()), num_held_out=settings.problems
            ),
            memory=MemoryNeeds(engine=True, max_sequences=config.train.completions),
            disk=DiskNeeds(sampled_tokens=num_completions * config.sampling.max_tokens),
            rewards=tuple(config.rewards),
            endpoint=config.endpoint,
        )

    def parts(self, config: EvalConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def preview(self, config: EvalConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: EvalConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[EvalConfig] = _EvalStage()
