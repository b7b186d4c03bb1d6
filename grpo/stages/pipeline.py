"""`grpo pipeline`: the chain of R1's stages from one YAML.

Each stage is a command of its own, in a process and a folder of its own.

A stage that is finished is not run again, one that was killed goes on, and the table of all models
on all evaluation sets is the result.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.config import Judged, PipelineConfig, Quantize, RunConfig, Step
from grpo.config.reading import apply_overrides, read_yaml
from grpo.experience.prompts import Prompts
from grpo.run.directory import RunDirectory, read_metrics, write_file
from grpo.run.signals import Interrupted
from grpo.stages.registry import find_stage
from grpo.stages.resume import check_same
from grpo.stages.run_context import require_one_rank
from grpo.stages.stage import Check, Part, Stage
from grpo.types import Problem, RunError, UserError


def pipeline(config: PipelineConfig, *, resume: bool) -> None:
    """Runs what is not finished, writes table.md and table.json.

    Raises UserError for any stage's mistake before the first one starts.
    """
    require_one_rank("pipeline")
    steps = checked(config)
    run = RunDirectory(
        config.run_dir, resume=resume or (Path(config.run_dir) / "manifest.json").exists()
    )
    run.update_manifest(
        stage="pipeline", status="running", seed=config.seed, stages=[name for name, *_ in steps]
    )
    for name, command, arguments in steps:
        folder = Path(config.run_dir) / name
        status = RunDirectory.status(folder)
        if status == "finished":
            check_same(folder, _load(command, arguments))
        else:
            call = [command, *arguments, *(["--resume"] if status is not None else [])]
            print(f"== {name}: grpo {' '.join(call)}", file=sys.stderr, flush=True)
            _call(call, name, run, _ranks(config, name, command))
    rows = table(config)
    write_file(run.path / "table.json", json.dumps(rows, indent=2) + "\n")
    write_file(run.path / "table.md", markdown(rows) + "\n")
    run.update_manifest(status="finished")
    print(markdown(rows))


def checked(config: PipelineConfig) -> list[tuple[str, str, list[str]]]:
    """Returns the plan. Raises UserError naming the stage whose config is wrong."""
    steps = list(plan(config))
    for name, command, arguments in steps:
        try:
            _load(command, arguments)
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from None
    return steps


def _load(command: str, arguments: list[str]) -> RunConfig:
    """Returns the checked config of a step. `arguments` are `[config, override, ...]`."""
    config: RunConfig = configs.load(arguments[0], arguments[1:], find_stage(command).config_class)
    return config


def plan(config: PipelineConfig) -> Iterator[tuple[str, str, list[str]]]:
    """Yields `(folder, command, arguments)` of every stage and every evaluation, in order.

    `arguments` are `[config, override, ...]`.
    """
    first = next(iter(config.stages.values()))
    for judged, settings in config.eval.items():
        if settings.start:
            own = str(_tree(first).get("model", {}).get("path"))
            yield f"start-{judged}", "eval", _evaluation(config, f"start-{judged}", settings, own)
    for name, step in config.stages.items():
        yield (
            name,
            step.command,
            [
                step.config,
                f"run_dir={config.run_dir}/{name}",
                f"seed={config.seed}",
                *_inherited(config, step),
            ],
        )
        for label, model in _models(config, name).items():
            for judged, settings in config.eval.items():
                yield (
                    f"{label}-{judged}",
                    "eval",
                    _evaluation(config, f"{label}-{judged}", settings, model),
                )


def _inherited(config: PipelineConfig, step: Step) -> list[str]:
    """Returns the overrides that carry what earlier stages left, then the step's own."""
    found = []
    if step.model:
        found += [
            f"model.path={_final(config, step.model)}",
            *(["model.warm_start="] if step.command == "train" else []),
        ]
    if step.teacher:
        found.append(f"model.teacher={_final(config, step.teacher)}")
    if step.traces:
        found.append(f"data={{name: traces, path: {config.run_dir}/{step.traces}}}")
    return found + _overrides(step.set)


def _evaluation(config: PipelineConfig, folder: str, settings: Judged, model: str) -> list[str]:
    own = [
        f"run_dir={config.run_dir}/{folder}",
        f"seed={config.seed}",
        f"model.path={model}",
        "model.warm_start=",
    ]
    return [settings.config, *own, *_overrides(settings.set)]


def _models(config: PipelineConfig, name: str) -> dict[str, str]:
    """Returns the models that a stage leaves, by their row of the table."""
    step = config.stages[name]
    if step.command == "collect":
        return {}
    if step.command == "quantize":
        schemes = _tree(step).get("quantize", {}).get("schemes") or Quantize().schemes
        return {f"{name}-{scheme}": f"{config.run_dir}/{name}/{scheme}" for scheme in schemes}
    return {name: _final(config, name)}


def _final(config: PipelineConfig, name: str) -> str:
    sequence = (
        config.stages[name].command == "distill"
        and _tree(config.stages[name]).get("way") == "sequence"
    )
    return f"{config.run_dir}/{name}/{'sft/final' if sequence else 'final'}"


def _tree(step: Step) -> dict[str, Any]:
    """Returns what a step's YAML says, before what earlier stages add to it."""
    return apply_overrides(read_yaml(step.config), _overrides(step.set))


def _overrides(given: dict[str, Any]) -> list[str]:
    """Returns command-line words that YAML reads back as the same values.

    The values are quoted, so that "off" and "Think: then answer" stay strings.
    """
    return [f"{key}={'' if value is None else json.dumps(value)}" for key, value in given.items()]


def _ranks(config: PipelineConfig, name: str, command: str) -> int:
    """Returns on how many ranks a stage runs: those that only learn on as many as there are."""
    sequence = command == "distill" and _tree(config.stages[name]).get("way") == "sequence"
    return config.ranks if command in ("sft", "train", "distill") and not sequence else 1


def _call(arguments: list[str], name: str, run: RunDirectory, ranks: int) -> None:
    """Runs a command to its end. Raises UserError, RunError or Interrupted as it ended."""
    libc, got = ctypes.CDLL(None), list[int]()
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    # a process group of its own: a terminal's Ctrl-C reaches it once, from here
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "grpo", *arguments],
        preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
        process_group=0,
    )

    def forward(number: int, _: Any) -> None:
        got.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code or got:
        run.update_manifest(status=f"stopped in {name}")
        if code == 130 or got:
            raise Interrupted(signal.Signals(got[0]).name if got else "a signal")
        raise (UserError if code == 2 else RunError)(
            f"stage {name} ended with code {code}; go on with the same command"
        )


def table(config: PipelineConfig) -> list[dict[str, Any]]:
    """Returns one row a model: its stage, and for each evaluation set the `eval/` metrics."""
    names = [*(["start"] if any(judged.start for judged in config.eval.values()) else [])]
    names += [label for name in config.stages for label in _models(config, name)]
    rows = []
    for name in names:
        row: dict[str, Any] = {"stage": name}
        for judged in config.eval:
            found = read_metrics(Path(config.run_dir) / f"{name}-{judged}" / "metrics.jsonl")
            if found:
                row[judged] = {
                    key.removeprefix("eval/"): value
                    for key, value in found[-1].items()
                    if key.startswith("eval/")
                }
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table of accuracies, stages down, evaluation sets across.

    Where there is no accuracy, the first metric takes its place.
    """
    sets = list(dict.fromkeys(key for row in rows for key in row if key != "stage"))
    lines = ["| stage | " + " | ".join(sets) + " |", "|---|" + "---|" * len(sets)]
    for row in rows:
        cells = []
        for name in sets:
            metrics = row.get(name)
            value = metrics and metrics.get("accuracy", next(iter(metrics.values())))
            cells.append("" if value is None else f"{value:.1%}")
        lines.append(f"| {row['stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class _PipelineStage:
    command = "pipeline"
    config_class = PipelineConfig
    sections = ("stages",)

    def run(self, config: PipelineConfig, *, resume: bool) -> None:
        pipeline(config, resume=resume)

    def arithmetic(self, config: PipelineConfig) -> str:
        return "\n".join(
            f"{name:24} grpo {command} {' '.join(arguments)}"
            for name, command, arguments in checked(config)
        )

    def needs(self, config: PipelineConfig) -> None:
        return None

    def parts(self, config: PipelineConfig) -> list[Part]:
        raise UserError(
            "grpo doctor takes the config of one stage; `grpo pipeline CONFIG --dry-run` checks "
            "the chain"
        )

    def preview(self, config: PipelineConfig) -> list[str]:
        return []

    def checks(
        self, config: PipelineConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[PipelineConfig] = _PipelineStage()
