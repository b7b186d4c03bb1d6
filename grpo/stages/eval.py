"""`grpo eval`: judges a model on held-out problems, and compares two evaluations.

A train config's prompts and rewards, or a protocol, decide how a model is judged.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from grpo.stages.sampling import Sampler, check_rewards, load_rewards
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
    config = config.by_protocol()
    if not config.endpoint:
        config = with_final_model(config)
    pool, rewards = load_rewards(config)
    sets = config.judged
    loaded = {name: load_problems(data, "test", config.seed) for name, data in sets.items()}
    with open_stage(config, "eval", total=len(sets), unit="evaluation", resume=resume) as context:
        context.stack.callback(pool.close)
        sampler = Sampler(config, context, config.endpoint)
        write_file(context.run.metrics, "")  # one row, written at the end
        context.display.begin(0)
        metrics: dict[str, Any] = {}
        table = {}
        for done, (name, data) in enumerate(sets.items()):
            chosen = held_out(data, loaded[name], sampler.prompts, config.eval.problems)
            rows = _judge(config, context, sampler, rewards, name, chosen, done)
            prefix = f"eval/{name}/" if name else "eval/"
            found = summary([row for row in rows if not row["greedy"]])
            table[name or "all"] = found
            metrics |= {prefix + key: value for key, value in found.items()}
            if greedy := [row for row in rows if row["greedy"]]:
                metrics |= {
                    f"{prefix}greedy/{key}": value for key, value in summary(greedy).items()
                }
        context.record({"step": 0, **metrics})
        write_file(context.run.path / "table.json", json.dumps(table, indent=2) + "\n")
        write_file(context.run.path / "table.md", markdown(table) + "\n")
        for key, value in metrics.items():
            context.display.say(f"{key.removeprefix('eval/'):32} {value:.3f}")


def with_final_model(config: EvalConfig) -> EvalConfig:
    """Returns the config with the model of the run directory, where model.path is one."""
    return config.model_copy(
        update={"model": config.model.model_copy(update={"path": final_model(config.model.path)})}
    )


def _judge(
    config: EvalConfig,
    context: RunContext,
    sampler: Sampler,
    rewards: Any,
    name: str,
    problems: Sequence[Problem],
    done: int,
) -> list[dict[str, Any]]:
    """Returns the rows of a set, chunk by chunk; a chunk that is written is not sampled again."""
    settings, samples = config.eval, context.run.samples
    r1 = settings.protocol == "r1"
    count = (64 if len(problems) <= 100 else 16) if r1 else settings.samples
    passes = [
        (settings.temperature, count),
        *([(0.0, 1)] if settings.temperature and not r1 else []),
    ]
    label = name or "000000"
    whole = samples / f"eval-{label}.jsonl"
    parts = []
    for number in range(-(-len(problems) // config.chunk)):
        file = samples / f"part-{label}-{number:06d}.jsonl"
        parts.append(file)
        if whole.exists() or file.exists():
            continue
        part, rows = problems[number * config.chunk : (number + 1) * config.chunk], []
        told = f"{name} {number * config.chunk}/{len(problems)}".strip()
        for temperature, size in passes:
            context.signals.check()
            groups = sampler.sample(
                part,
                size,
                temperature,
                partial(_show_progress, context, done, told),
            )
            scored = score(groups, rewards, sampler.prompts.for_rewards)
            rows += [
                row | {"greedy": len(passes) > 1 and temperature == 0}
                for row in sample_rows(scored)
            ]
        context.run.write_samples(file.stem, rows)
    if not whole.exists():
        write_file(whole, "".join(file.read_text() for file in parts))
    for file in parts:
        file.unlink(missing_ok=True)
    return [json.loads(line) for line in whole.read_text().splitlines()]


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Returns what completions say.

    Accuracy is the mean over problems of the share that is right (pass@1), with its 95 % interval
    over problems; an undecided completion counts as wrong, and is counted. Then pass@k, maj@n, and
    length of right and wrong ones.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    found = {"mean": mean(rewards), "completion/length": mean([row["tokens"] for row in rows])}
    found["completion/truncated"] = mean([float(row["finish_reason"] == "length") for row in rows])
    for name in rows[0]["parts"]:
        found[name] = mean([row["parts"][name] for row in rows if row["parts"][name] is not None])
    by_problem: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    if any(row["verdict"] is None for row in rows):
        return found
    right = [[row["verdict"] == "correct" for row in group] for group in by_problem.values()]
    n = min(map(len, right))
    shares = [sum(row) / len(row) for row in right]
    found["accuracy"] = mean(shares)
    found["accuracy/low"], found["accuracy/high"] = statistics.interval(shares)
    if n > 1:
        for k in (2**power for power in range(n.bit_length()) if 2**power <= n):
            found[f"pass@{k}"] = mean(
                [statistics.pass_at_k(len(row), sum(row), k) for row in right]
            )
        answers = [
            [final_answer(row["completion"]) for row in group] for group in by_problem.values()
        ]
        found[f"maj@{n}"] = mean(
            [statistics.majority(*pair) for pair in zip(answers, right, strict=True)]
        )
    found["undecided"] = mean([float(row["verdict"] == "undecided") for row in rows])
    for name, wanted in (("right", True), ("wrong", False)):
        if lengths := [
            float(row["tokens"]) for row in rows if (row["verdict"] == "correct") == wanted
        ]:
            found[f"length/{name}"] = mean(lengths)
    return found


def _show_progress(context: RunContext, done: int, part: str, ready: int, total: int) -> None:
    context.display.phase(done, "sampling", f"{part}, {ready}/{total}")


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the sets down and what is most asked for across; table.json has everything."""
    columns = list(
        dict.fromkeys(
            key
            for row in table.values()
            for key in row
            if key in SHOWN or key.startswith(("pass@", "maj@"))
        )
    )
    lines = ["| set | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in table.items():
        cells = [
            ("" if key not in row else f"{row[key]:.1f}" if "length" in key else f"{row[key]:.1%}")
            for key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ask(model: str, question: str) -> None:
    """Prints what a model thinks of a problem, and its answer.

    `model`: a run, whose prompts it takes, a directory or a hub id.
    """
    import tempfile

    from grpo import config as configs
    from grpo.config.reading import read_yaml

    require_one_rank("ask")
    file = Path(model) / "config.yaml"
    tree = read_yaml(str(file)) if file.exists() else {}
    kept = {key: tree[key] for key in ("prompt", "sampling", "engine") if key in tree}
    with tempfile.TemporaryDirectory(prefix="grpo-ask-") as scratch:
        if not kept:
            folder = models.resolve(final_model(model), None, Path(scratch) / "model", 0)
            kept["prompt"] = {
                "template": "chat" if models.load_tokenizer(folder).chat_template else "plain"
            }
        # int4's kernels know no other
        dtype = "bfloat16" if "quantize" in tree else tree.get("model", {}).get("dtype", "bfloat16")
        own = {
            "run_dir": f"{scratch}/run",
            "data": {"name": "arithmetic"},
            "logging": {"progress": "off"},
        }
        own |= {"model": {"path": final_model(model), "dtype": dtype}}
        config = configs.parse(kept | own, kind=EvalConfig)
        with open_stage(config, "ask", total=1, unit="question", resume=False) as context:
            problem = Problem(id="asked", question=question, answer="", source="asked")
            (group,) = Sampler(config, context, None).sample([problem], 1, 0.0, lambda *_: None)
    thoughts, end, answer = group.completions[0].text.rpartition("</think>")
    print(f"{thoughts}{end}\n" if end else "", answer.strip(), sep="")


def compare(first: str, second: str) -> None:
    """Prints how two evaluations of the same problems differ, set by set.

    It uses a paired bootstrap over problems, and tells where each is better.
    """
    a, b = (_rates(Path(folder)) for folder in (first, second))
    if not a.keys() & b.keys():  # a run's own set has no name
        a, b = (
            {"": {problem: rate for rates in each.values() for problem, rate in rates.items()}}
            for each in (a, b)
        )
    common = {
        name: [problem for problem in a[name] if problem in b[name]] for name in a if name in b
    }
    if not any(common.values()):
        raise UserError(f"{first} and {second} have no problem in common")
    for name, problems in ((name, problems) for name, problems in common.items() if problems):
        ours, theirs = ([rates[name][problem] for problem in problems] for rates in (a, b))
        found = statistics.paired(ours, theirs)
        for folder, rates in ((first, ours), (second, theirs)):
            low, high = statistics.interval(rates)
            print(f"{f'{folder} {name}'.strip():40} {mean(rates):6.1%}  [{low:.1%}, {high:.1%}]")
        print(
            f"second less first: {found['difference']:+.1%} [{found['low']:+.1%}, "
            f"{found['high']:+.1%}], p = {found['p']:.3g}, "
            f"{len(problems)} problems: better on {found['better']:.0f}, worse on "
            f"{found['worse']:.0f}, equal on {found['equal']:.0f}"
        )
        changes = sorted(
            (y - x, problem) for x, y, problem in zip(ours, theirs, problems, strict=True) if x != y
        )
        for told, most in (
            ("better", [one for one in reversed(changes) if one[0] > 0]),
            ("worse", [one for one in changes if one[0] < 0]),
        ):
            if most:
                listed = ", ".join(f"{problem} {change:+.0%}" for change, problem in most[:8])
                print(f"  {told}: {listed}{', ...' if most[8:] else ''}")


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
    values: dict[str, dict[str, list[bool]]] = {}
    for name in numbered[-1:] or files:
        of_set = values.setdefault("" if numbered else name, defaultdict(list))
        for row in map(json.loads, files[name].read_text().splitlines()):
            if row["verdict"] is None:
                raise UserError(
                    f"{folder}: its rewards give no verdicts, there is no accuracy to compare"
                )
            if not row.get("greedy"):
                of_set[row["problem"]].append(row["verdict"] == "correct")
    return {
        name: {problem: mean([float(ok) for ok in group]) for problem, group in of_set.items()}
        for name, of_set in values.items()
    }


class _EvalStage:
    command = "eval"
    summary = (
        "judge a model by a config's prompts and rewards; or "
        "compare two: `grpo eval RUN RUN`; or ask it: --ask"
    )
    config_class = EvalConfig
    sections = ("sets", "endpoint")
    multi_rank = False

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
