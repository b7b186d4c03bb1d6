"""`grpo eval`: a train config's model on its held-out problems, sampled and judged as the training would; or two evaluations compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo import models, rollout, statistics
from grpo.checkpoint import write_file
from grpo.config import Config
from grpo.loop import sampling_options
from grpo.rollout import mean
from grpo.stages._run import held_out, judges, load_problems, open_stage, prepare, start_engine
from grpo.types import ScoredGroup, UserError
from rewards._parse import final_answer


def eval(config: Config, *, resume: bool) -> None:
    """Writes `eval/` metrics, every completion and table.md into the run directory."""
    if resume:
        raise UserError("grpo eval: an evaluation is not resumed; start it again in another run_dir")
    if config.model.warm_start:
        raise UserError("grpo eval judges model.path as it is: give model.path=RUN/final, and model.warm_start= (nothing)")
    pool, rewards = judges(config)
    data = config.eval.data or config.data
    problems = load_problems(data, "test", config.seed)
    with open_stage(config, "eval", total=1, unit="evaluation", resume=False) as stage:
        stage.stack.callback(pool.close)
        model_dir, _, prompts = prepare(config, stage.run)
        models.check_context(model_dir, config.max_sequence_tokens)
        chosen = held_out(data, problems, prompts, config.eval.problems)
        engine = start_engine(config, stage, model_dir, models.num_weights(model_dir), load_weights=True)
        stage.display.begin(0)
        metrics, scored = rollout.evaluate(
            engine, prompts, chosen, rewards, sampling_options(config, prompts, config.eval.temperature), samples=config.eval.samples,
            run_seed=config.seed, on_progress=lambda done, total: stage.display.phase(0, "sampling", f"{done}/{total}"),
        )  # fmt: skip
        stage.run.write_samples("eval-000000", rollout.sample_rows(scored))
        metrics |= {f"eval/{name}": value for name, value in summary(scored[: len(chosen)]).items()}
        stage.record({"step": 0, **metrics})
        shown = {name.removeprefix("eval/"): value for name, value in metrics.items() if not name.endswith(("tokens", "missing", "max"))}
        lines = ["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in shown.items())]
        write_file(stage.run.path / "table.md", "\n".join(lines) + "\n")
        for name, value in shown.items():
            stage.display.say(f"{name:32} {value:.3f}")


def summary(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Returns what verdicts say beyond their mean: an interval over problems, pass@k, maj@n, undecided, length of right and wrong.

    Undecided completions count as wrong here, and are counted. Nothing without verdicts.
    """
    verdicts = [[verdict.value for verdict in scored.verdicts if verdict is not None] for scored in groups]
    if not all(verdicts):
        return {}
    right = [[value == "correct" for value in row] for row in verdicts]
    n = min(map(len, right))
    low, high = statistics.interval([sum(row) / len(row) for row in right])
    found = {"accuracy/low": low, "accuracy/high": high}
    if n > 1:
        for k in (2**power for power in range(n.bit_length()) if 2**power <= n):
            found[f"pass@{k}"] = mean([statistics.pass_at_k(len(row), sum(row), k) for row in right])
        answers = [[final_answer(completion.text) for completion in scored.group.completions] for scored in groups]
        found[f"maj@{n}"] = mean([statistics.majority(*pair) for pair in zip(answers, right, strict=True)])
    found["undecided"] = mean([float(value == "undecided") for row in verdicts for value in row])
    lengths = [
        (ok, len(completion.token_ids))
        for scored, row in zip(groups, right, strict=True)
        for ok, completion in zip(row, scored.group.completions, strict=True)
    ]
    for name, wanted in (("right", True), ("wrong", False)):
        if of_kind := [float(length) for ok, length in lengths if ok == wanted]:
            found[f"length/{name}"] = mean(of_kind)
    return found


def compare(first: str, second: str) -> None:
    """Prints how two evaluations of the same problems differ: paired bootstrap over problems, and where each is better."""
    a, b = (_rates(Path(folder)) for folder in (first, second))
    common = [problem for problem in a if problem in b]
    if not common:
        raise UserError(f"{first} and {second} have no problem in common")
    found = statistics.paired([a[problem] for problem in common], [b[problem] for problem in common])
    for folder, rates in ((first, a), (second, b)):
        low, high = statistics.interval([rates[problem] for problem in common])
        print(f"{folder:40} {mean([rates[problem] for problem in common]):6.1%}  [{low:.1%}, {high:.1%}]")
    print(
        f"second less first: {found['difference']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}], p = {found['p']:.3g}, "
        f"{len(common)} problems: better on {found['better']:.0f}, worse on {found['worse']:.0f}, equal on {found['equal']:.0f}"
    )


def _rates(folder: Path) -> dict[str, float]:
    """Returns the pass rate of each problem in an evaluation's, or a run's last, samples (greedy ones left out where there are others)."""
    files = sorted((folder / "samples").glob("eval-*.jsonl"))
    if not files:
        raise UserError(f"{folder}: no evaluation in it (samples/eval-*.jsonl)")
    values: dict[str, list[bool]] = {}
    rows: list[dict[str, Any]] = [json.loads(line) for line in files[-1].read_text().splitlines()]
    for row in rows:
        values.setdefault(row["problem"], []).append(row["verdict"] == "correct")
    sampled = max(map(len, values.values()))
    return {problem: mean([float(ok) for ok in row[: max(1, sampled - 1)]]) for problem, row in values.items()}
