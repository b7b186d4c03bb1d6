"""`grpo pipeline`: runs the stages of one YAML file in order and evaluates the model of each.

Each stage and each evaluation is a separate command in a separate process, with a run directory
inside the pipeline's. Finished commands are skipped and interrupted ones are resumed. The result is
a table of all models on all evaluation sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grpo import config as configs
from grpo.config import (
    PipelineConfig,
    PipelineEvalSettings,
    PipelineStageSettings,
    QuantizeSettings,
    RunConfig,
)
from grpo.config.reading import apply_overrides, read_yaml
from grpo.config.sections import DROP_KEYS
from grpo.experience.prompts import Prompts
from grpo.run.directory import RunDirectory, read_metrics, write_file
from grpo.run.display import redirect_output
from grpo.run.signals import RunInterruptedError
from grpo.stages.pipeline_contexts import check_contexts
from grpo.stages.registry import find_stage
from grpo.stages.resume import require_same_config
from grpo.stages.run_context import require_one_rank
from grpo.stages.stage import Check, Part, Stage
from grpo.types import Problem, RunError, UserError

PR_SET_PDEATHSIG = 1  # Linux prctl: the signal that a process receives when its parent dies
LOG_NAME = "pipeline.log"
EXIT_USER_ERROR = 2  # exit codes of the command line
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCommand:
    """A command of a pipeline.

    `PlannedCommand(name="rl", command="train", config_file="rl.yaml", overrides=("seed=3",))`.
    """

    name: str  # folder in the pipeline's run_dir
    command: str
    config_file: str
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """The arguments of `grpo` on the command line."""
        return [self.command, self.config_file, *self.overrides]

    def load_config(self) -> RunConfig:
        """Returns the checked config. Raises UserError if it is wrong."""
        config_class = find_stage(self.command).config_class
        config: RunConfig = configs.load(self.config_file, list(self.overrides), config_class)
        return config

    def recorded_config(self) -> RunConfig:
        """Returns the config that the command records in its run directory.

        `grpo distill` with way on_policy runs `grpo train` there, which records a train config.
        """
        config = self.load_config()
        first_part, *other_parts = find_stage(self.command).parts(config)
        if other_parts:  # each part has a folder of its own
            return config
        recorded: RunConfig = first_part.config
        return recorded


def pipeline(
    config: PipelineConfig, *, resume: bool, output: Literal["terminal", "file"] = "terminal"
) -> None:
    """Runs all unfinished commands, then writes table.md and table.json.

    Args:
        config: The config of the pipeline.
        resume: Whether to continue the run in `config.run_dir`.
        output: Where the output of the commands and the table go. `file` is pipeline.log in the
            run directory.

    Raises:
        UserError: A config is wrong, or the sequences of a stage do not fit its model (all are
            checked before the first command starts), or a command ended with a UserError.
        RunError: A command failed.
        RunInterruptedError: A signal stopped a command.
    """
    require_one_rank("pipeline")
    commands = checked_plan(config)
    check_contexts(commands, _written_models(config))
    has_run = (Path(config.run_dir) / "manifest.json").exists()
    run = RunDirectory(config.run_dir, resume=resume or has_run)
    with contextlib.closing(run):
        if output == "terminal":
            _run_all(config, commands, run)
            return
        log_file = run.path / LOG_NAME
        with redirect_output(log_file):
            _run_all(config, commands, run, log_file)


def _run_all(
    config: PipelineConfig,
    commands: Sequence[PlannedCommand],
    run: RunDirectory,
    log_file: Path | None = None,
) -> None:
    from grpo.metrics.cpu import int4_obstacle

    run.update_manifest(
        stage="pipeline",
        status="running",
        seed=config.seed,
        stages=[command.name for command in commands],
    )
    obstacle = int4_obstacle()
    int4_evaluations = _int4_evaluations(config)
    for command in commands:
        if obstacle is not None and command.name in int4_evaluations:
            print(f"{command.name}: not evaluated: {obstacle}")
            continue
        _run_unfinished(command, run, num_ranks=_num_ranks(config, command), log_file=log_file)
    rows = table(config)
    write_file(run.path / "table.json", json.dumps(rows, indent=2) + "\n")
    write_file(run.path / "table.md", markdown_table(rows) + "\n")
    run.update_manifest(status="finished")
    print(markdown_table(rows))


def checked_plan(config: PipelineConfig) -> list[PlannedCommand]:
    """Returns the plan after loading every config.

    Raises:
        UserError: A config is wrong. The message names the stage or evaluation.
    """
    commands = list(plan(config))
    for command in commands:
        try:
            command.load_config()
        except UserError as error:
            raise UserError(f"stage {command.name}: {error}") from None
    return commands


def plan(config: PipelineConfig) -> Iterator[PlannedCommand]:
    """Yields the commands of all stages and evaluations, in order.

    The model from which the first stage starts is evaluated first.
    """
    first_stage = next(iter(config.stages.values()))
    for set_name, evaluation in config.eval.items():
        if evaluation.start:
            start_model = str(_config_tree(first_stage).get("model", {}).get("path"))
            yield _evaluation(config, f"start-{set_name}", evaluation, start_model)
    for name, settings in config.stages.items():
        yield _stage_command(config, name, settings)
        for label, model in _models(config, name).items():
            for set_name, evaluation in config.eval.items():
                yield _evaluation(config, f"{label}-{set_name}", evaluation, model)


def _stage_command(
    config: PipelineConfig, name: str, settings: PipelineStageSettings
) -> PlannedCommand:
    """Returns the command of a stage. The overrides in `set` come last and take precedence."""
    overrides = [f"run_dir={config.run_dir}/{name}", f"seed={config.seed}"]
    if settings.model:
        overrides.append(f"model.path={_final_model(config, settings.model)}")
        if settings.command == "train":
            overrides.append("model.warm_start=")  # the earlier stage takes its place
    if settings.teacher:
        overrides.append(f"model.teacher={_final_model(config, settings.teacher)}")
    for data_set, stage in settings.teachers.items():
        overrides.append(f"model.teachers.{data_set}={_final_model(config, stage)}")
    if settings.traces:
        overrides.append(f"data={_traces_section(config, settings)}")
    overrides += _format_overrides(settings.set)
    return PlannedCommand(
        name=name, command=settings.command, config_file=settings.config, overrides=tuple(overrides)
    )


def _traces_section(config: PipelineConfig, settings: PipelineStageSettings) -> str:
    """Returns the section `data` of a stage that trains on the traces of an earlier one.

    What the stage's own config says about traces that cannot be used stays in force.
    """
    data = {"name": "traces", "path": f"{config.run_dir}/{settings.traces}"}
    configured = _config_tree(settings).get("data", {})
    data |= {key: configured[key] for key in DROP_KEYS if key in configured}
    return "{" + ", ".join(f"{key}: {value}" for key, value in data.items()) + "}"


def _evaluation(
    config: PipelineConfig, name: str, evaluation: PipelineEvalSettings, model: str
) -> PlannedCommand:
    overrides = [
        f"run_dir={config.run_dir}/{name}",
        f"seed={config.seed}",
        f"model.path={model}",
        "model.warm_start=",
        *_format_overrides(evaluation.set),
    ]
    return PlannedCommand(
        name=name, command="eval", config_file=evaluation.config, overrides=tuple(overrides)
    )


def _written_models(config: PipelineConfig) -> dict[str, list[str]]:
    """Returns the directories of the models that each stage writes, by its name."""
    return {name: list(_models(config, name).values()) for name in config.stages}


def _models(config: PipelineConfig, name: str) -> dict[str, str]:
    """Returns the models that a stage writes, by their label in the table.

    `{"rl": "runs/r1/rl/final"}`, or `{"small-int8": "runs/r1/small/int8"}` for `quantize`.
    """
    settings = config.stages[name]
    if settings.command == "collect":
        return {}
    if settings.command == "quantize":
        quantize_tree = _config_tree(settings).get("quantize", {})
        schemes = quantize_tree.get("schemes") or QuantizeSettings().schemes
        return {f"{name}-{scheme}": f"{config.run_dir}/{name}/{scheme}" for scheme in schemes}
    return {name: _final_model(config, name)}


def _int4_evaluations(config: PipelineConfig) -> set[str]:
    """Returns the names of the commands that evaluate int4 models."""
    names = set()
    for stage, settings in config.stages.items():
        if settings.command == "quantize":
            names |= {f"{stage}-int4-{set_name}" for set_name in config.eval}
    return names


def _final_model(config: PipelineConfig, name: str) -> str:
    """Returns the directory of a stage's final model."""
    folder = "sft/final" if _is_sequence_distillation(config.stages[name]) else "final"
    return f"{config.run_dir}/{name}/{folder}"


def _is_sequence_distillation(settings: PipelineStageSettings) -> bool:
    return settings.command == "distill" and _config_tree(settings).get("way") == "sequence"


def _config_tree(settings: PipelineStageSettings) -> dict[str, Any]:
    """Returns the tree of a stage's YAML file, with the overrides in `set`.

    The overrides that depend on the pipeline and on other stages are not applied.
    """
    return apply_overrides(read_yaml(settings.config), _format_overrides(settings.set))


def _format_overrides(values: Mapping[str, Any]) -> list[str]:
    """Returns command-line overrides that parse to the same values.

    Strings are quoted, so that YAML does not read "off" as a boolean or "Think: then answer" as a
    mapping.
    """
    overrides = []
    for key, value in values.items():
        text = "" if value is None else json.dumps(value)
        overrides.append(f"{key}={text}")
    return overrides


def _num_ranks(config: PipelineConfig, command: PlannedCommand) -> int:
    """Returns the number of ranks of a command.

    Evaluations, stages without a learner, and `distill` with `way=sequence` run on one rank.
    """
    if command.command not in ("sft", "train", "distill"):
        return 1
    if _is_sequence_distillation(config.stages[command.name]):
        return 1
    return config.ranks


def _run_unfinished(
    command: PlannedCommand, run: RunDirectory, *, num_ranks: int, log_file: Path | None = None
) -> None:
    """Runs or resumes a command. If it has finished, checks that its config is the same.

    `log_file` has the output of the commands; None if they print it.
    """
    folder = run.path / command.name
    status = RunDirectory.status(folder)
    if status == "finished":
        require_same_config(folder, command.recorded_config())
        return
    arguments = command.arguments
    if status is not None:
        arguments.append("--resume")
    print(f"== {command.name}: grpo {' '.join(arguments)}", file=sys.stderr, flush=True)
    result = _run_process(arguments, num_ranks)
    if result.exit_code == 0 and not result.forwarded_signals:
        return
    run.update_manifest(status=f"stopped in {command.name}")
    if result.forwarded_signals:
        raise RunInterruptedError(signal.Signals(result.forwarded_signals[0]).name)
    if result.exit_code == EXIT_INTERRUPTED:
        raise RunInterruptedError("a signal")
    message = (
        f"stage {command.name} failed with exit code {result.exit_code}; run the same command "
        "again to continue"
    )
    if log_file is not None:
        message += f". The last line of {log_file}: {_last_line(log_file)}"
    if result.exit_code == EXIT_USER_ERROR:
        raise UserError(message)
    raise RunError(message)


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""


class ProcessResult(NamedTuple):
    """How a process ended: `ProcessResult(exit_code=130, forwarded_signals=[2])`."""

    exit_code: int
    forwarded_signals: list[int]


def _run_process(arguments: Sequence[str], num_ranks: int) -> ProcessResult:
    """Runs `grpo` in a process until it ends, and forwards SIGINT and SIGTERM to it."""
    libc = ctypes.CDLL(None)
    forwarded_signals: list[int] = []
    launcher = []
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]

    def terminate_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    # In a separate process group, the process receives a terminal's Ctrl-C once, through `forward`.
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "grpo", *arguments],
        preexec_fn=terminate_with_parent,
        process_group=0,
    )

    def forward(number: int, frame: Any) -> None:
        forwarded_signals.append(number)
        process.send_signal(number)

    previous_handlers = {}
    if threading.current_thread() is threading.main_thread():  # other threads receive no signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous_handlers[number] = signal.signal(number, forward)
    try:
        exit_code = process.wait()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return ProcessResult(exit_code, forwarded_signals)


def table(config: PipelineConfig) -> list[dict[str, Any]]:
    """Returns one row per model with the `eval/` metrics of every set.

    `[{"stage": "start", "aime": {"accuracy": 0.1}}, {"stage": "rl", "aime": {"accuracy": 0.4}}]`.
    """
    labels = []
    if any(evaluation.start for evaluation in config.eval.values()):
        labels.append("start")
    for name in config.stages:
        labels.extend(_models(config, name).keys())
    rows = []
    for label in labels:
        row: dict[str, Any] = {"stage": label}
        for set_name in config.eval:
            folder = Path(config.run_dir) / f"{label}-{set_name}"
            metrics_rows = read_metrics(folder / "metrics.jsonl")
            if metrics_rows:
                row[set_name] = _eval_metrics(metrics_rows[-1])
        rows.append(row)
    return rows


def _eval_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")
    }


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the accuracies as a table with a row per model and a column per evaluation set.

    A set without accuracies shows its first metric instead.
    """
    sets: list[str] = []
    for row in rows:
        sets += [key for key in row if key != "stage" and key not in sets]
    lines = ["| stage | " + " | ".join(sets) + " |", "|---|" + "---|" * len(sets)]
    for row in rows:
        cells = [_cell(row.get(name)) for name in sets]
        lines.append(f"| {row['stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(metrics: Mapping[str, float | None] | None) -> str:
    if not metrics:
        return ""
    first_metric = next(iter(metrics.values()))
    value = metrics.get("accuracy", first_metric)
    return "" if value is None else f"{value:.1%}"


class _PipelineStage:
    command = "pipeline"
    config_class = PipelineConfig
    sections = ("stages",)

    def run(self, config: PipelineConfig, *, resume: bool) -> None:
        pipeline(config, resume=resume)

    def batch_arithmetic(self, config: PipelineConfig) -> str:
        return "\n".join(
            f"{command.name:24} grpo {' '.join(command.arguments)}"
            for command in checked_plan(config)
        )

    def needs(self, config: PipelineConfig) -> None:
        return None

    def parts(self, config: PipelineConfig) -> list[Part]:
        raise UserError(
            "grpo doctor inspects the config of one stage. To check a pipeline, use `grpo pipeline "
            "CONFIG --dry-run`"
        )

    def dry_run_lines(self, config: PipelineConfig) -> list[str]:
        return check_contexts(checked_plan(config), _written_models(config))

    def checks(
        self, config: PipelineConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[PipelineConfig] = _PipelineStage()
