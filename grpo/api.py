"""The Python interface: `grpo.train(config)` does what `grpo train CONFIG` does, in this process.

The names of this module are also those of the package: `grpo.train`, `grpo.load`, `grpo.Run`.

A config is the path of a YAML file, a dict with the same keys, or a config object of `grpo.config`.
Overrides are values by dotted key: `{"train.rollouts": 5, "model.warm_start": None}`. Only warnings
are printed, unless the config sets `logging.progress`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo import config as configs
from grpo import json_lines
from grpo.config.reading import Section, read_yaml, replace_values
from grpo.run import ranks
from grpo.run.callbacks import CallbackError, RowCallback, RowCallbacks, StopRun, active_callbacks
from grpo.run.directory import read_manifest, read_metrics
from grpo.run.quiet import quiet_libraries, restored_environment
from grpo.run.signals import RunInterruptedError
from grpo.stages.final_model import final_model_path
from grpo.stages.loaded_model import Model
from grpo.stages.registry import find_stage
from grpo.types import UserError

Config = str | os.PathLike[str] | Mapping[str, Any] | Section
Overrides = Mapping[str, Any]

# The numbers of the last step in the text of a Run: the first that the run has.
SUMMARY_METRICS = ("eval/accuracy", "reward/mean", "loss")

_is_running = threading.Lock()


def train(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Trains with GRPO, as `grpo train`.

    Args:
        config: Path of a YAML file, a dict with the same keys, or a config object.
        overrides: Values that replace those of the config, by dotted key.
        callbacks: Functions that are called with each row of metrics when it is recorded, also
            with those of a warm start. A function that raises `grpo.StopRun` stops the run. After
            any other exception the run stops, too, and the exception is raised here. In both cases
            the last complete step is saved.
        resume: Whether to continue the run in the config's `run_dir`.

    Raises:
        UserError: The config, the data or a model is wrong, or another run is in progress.
        RunError: The run cannot continue.
        RunInterruptedError: Ctrl-C, or the interrupt of a notebook. The last complete step is
            saved.
    """
    return _run("train", config, overrides, callbacks, resume)


def sft(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Fine-tunes on worked solutions, as `grpo sft`. The arguments are those of `train`."""
    return _run("sft", config, overrides, callbacks, resume)


def collect(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Samples traces, as `grpo collect`. The arguments are those of `train`."""
    return _run("collect", config, overrides, callbacks, resume)


def distill(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Distills a teacher into a student, as `grpo distill`. The arguments are those of `train`."""
    return _run("distill", config, overrides, callbacks, resume)


def quantize(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Writes a model with fewer bits, as `grpo quantize`. The arguments are those of `train`."""
    return _run("quantize", config, overrides, callbacks, resume)


def evaluate(
    config: Config,
    overrides: Overrides | None = None,
    *,
    callbacks: Sequence[RowCallback] = (),
    resume: bool = False,
) -> Run:
    """Evaluates a model, as `grpo eval`. The arguments are those of `train`."""
    return _run("eval", config, overrides, callbacks, resume)


def pipeline(config: Config, overrides: Overrides | None = None, *, resume: bool = False) -> Run:
    """Runs several stages, as `grpo pipeline`. The arguments are those of `train`.

    Each stage is a process of its own, so there are no callbacks. The output is in pipeline.log. A
    pipeline that has begun in this `run_dir` is continued, with and without `resume`.
    """
    from grpo.stages.pipeline import pipeline as run_pipeline

    loaded_config = load_config(config, overrides, configs.PipelineConfig)
    run_stage = functools.partial(run_pipeline, loaded_config, resume=resume, output="file")
    return _run_here(run_stage, loaded_config.run_dir, ())


def load(model: str | os.PathLike[str], overrides: Overrides | None = None) -> Model:
    """Returns a model that answers questions. It is ready when this function returns.

    `with grpo.load("runs/x") as model: model.generate(["2 + 2 = ?"])`

    Args:
        model: A run or its directory, a directory of a model, or a hub id. For a run, its dtype and
            its prompt, sampling and engine settings are used too.
        overrides: Values of the sections `prompt`, `sampling` and `engine`, and `model.dtype`, by
            dotted key: `{"sampling.max_tokens": 2048}`.

    Raises:
        UserError: The model does not exist, or an override is wrong.
        RunError: The engine does not start.
    """
    with quiet_libraries():
        return Model(model, overrides)


@dataclass(frozen=True, init=False, repr=False)
class Run:
    """The results in a run directory. Every access reads the files, also during the run.

    Attributes:
        path: The run directory.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UserError if the directory holds no run."""
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"expected the path of a run, got {path!r}")
        object.__setattr__(self, "path", Path(path))
        if not read_manifest(self.path):
            raise UserError(f"{self.path}: not a run directory (no manifest.json)")

    def __fspath__(self) -> str:
        """Returns the path, so that a Run can be used in place of its directory."""
        return str(self.path)

    @property
    def stage(self) -> str:
        """The command that wrote the run, such as `train`."""
        return str(self._manifest.get("stage"))

    @property
    def status(self) -> str:
        """The state of the run, such as `running` or `finished`, or why it has stopped."""
        return str(self._manifest.get("status"))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as nested dicts; empty for a pipeline, whose stages have configs."""
        file = self.path / "config.yaml"
        if not file.exists():
            return {}
        tree: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return tree

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics, as `pandas.DataFrame` takes them."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def final(self) -> Path | None:
        """The directory of the final model, None if the run has none."""
        folder = Path(final_model_path(str(self.path)))
        return folder if folder.exists() else None

    @property
    def table(self) -> Any:
        """The results of `evaluate`, `quantize` and `pipeline`; None for other stages.

        For an evaluation, the metrics by set: `{"all": {"accuracy": 0.5, "format": 0.9}}`. For the
        other two, a row per model: `[{"model": "int8", "megabytes": 4.7, "accuracy": "98.0%"}]`.
        """
        file = self.path / "table.json"
        if not file.exists():
            return None
        return json.loads(file.read_text(encoding="utf-8"))

    def samples(self, step: int | None = None, *, held_out: bool = False) -> list[dict[str, Any]]:
        """Returns the completions of a step with their scores, one dict per completion.

        For `grpo eval` these are all completions. If its sets have names, the key `set` has them.

        Args:
            step: The step, or for `grpo collect` the chunk. Default: the last one.
            held_out: Whether to return the completions of the evaluation after this step.

        Raises:
            UserError: The step has no samples.
        """
        is_evaluation = held_out or self.stage == "eval"
        prefixes = ("eval-",) if is_evaluation else ("step-", "chunk-")
        files = []
        for prefix in prefixes:
            files += sorted((self.path / "samples").glob(f"{prefix}*.jsonl"))
        if self.stage == "eval" and step is None:
            return _samples_of_sets(files)
        files_by_step = {}
        for file in files:
            label = file.stem.partition("-")[2]
            if label.isdecimal():
                files_by_step[int(label)] = file
        if step is None and not files_by_step:
            return []
        if step is None:
            step = max(files_by_step)
        if step not in files_by_step:
            available = ", ".join(map(str, files_by_step)) or "none"
            raise UserError(f"{self.path}: step {step} has no samples. Available: {available}")
        return json_lines.read_objects(files_by_step[step])

    @property
    def _manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    def __repr__(self) -> str:
        """Returns a summary: `Run('runs/x': train, finished, step 16, eval/accuracy 0.995)`."""
        parts = [self.stage, self.status]
        rows = self.metrics
        if rows:
            parts.append(f"step {rows[-1].get('step')}")
        for name in SUMMARY_METRICS:
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                parts.append(f"{name} {values[-1]:.3f}")
                break
        return f"Run({str(self.path)!r}: {', '.join(parts)})"


def _samples_of_sets(files: Sequence[Path]) -> list[dict[str, Any]]:
    rows = []
    for file in files:
        name = file.stem.removeprefix("eval-")
        for row in json_lines.read_objects(file):
            if not name.isdecimal():  # the only set, without a name, has a number
                row["set"] = name
            rows.append(row)
    return rows


def _run(
    command: str,
    config: Config,
    overrides: Overrides | None,
    callbacks: Sequence[RowCallback],
    resume: bool,
) -> Run:
    """Runs a stage in this process and returns its run."""
    stage = find_stage(command)
    loaded_config = load_config(config, overrides, stage.config_class)
    run_stage = functools.partial(stage.run, loaded_config, resume=resume)
    return _run_here(run_stage, loaded_config.run_dir, callbacks)


def _run_here(run_stage: Callable[[], None], run_dir: str, callbacks: Sequence[RowCallback]) -> Run:
    """Calls `run_stage` and turns what stops it into a value or an exception for the caller."""
    row_callbacks = RowCallbacks(_checked_callbacks(callbacks))
    try:
        with _one_run_at_a_time(), active_callbacks(row_callbacks):
            run_stage()
    except StopRun:
        pass
    except CallbackError:
        if row_callbacks.error is None:  # a callback on rank 0, and this is another rank
            raise
    except RunInterruptedError as error:
        raise _interruption(error, run_dir) from None
    callback_error = row_callbacks.error
    if callback_error is not None and not isinstance(callback_error, StopRun):
        callback_error.add_note(f"A callback raised it. To continue {run_dir}: resume=True")
        raise callback_error
    return Run(run_dir)


def _interruption(error: RunInterruptedError, run_dir: str) -> RunInterruptedError:
    """Returns the error of a run that a signal has stopped."""
    message = f"interrupted by {error}"
    if read_manifest(Path(run_dir)):
        return RunInterruptedError(f"{message}; {run_dir} is saved: continue it with resume=True")
    return RunInterruptedError(f"{message} before the run {run_dir} began")


def _checked_callbacks(callbacks: Any) -> Sequence[RowCallback]:
    """Raises UserError if the callbacks are not functions in a list."""
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise UserError(
            f"callbacks: expected a list of functions of one row, e.g. [print], got {callbacks!r}"
        )
    return callbacks


@contextlib.contextmanager
def _one_run_at_a_time() -> Iterator[None]:
    """Raises UserError if a run is in progress. Restores the state of the process at its end.

    DeepSpeed, the process group and the environment belong to the process, so it has one run.
    """
    if not _is_running.acquire(blocking=False):
        raise UserError(
            "another run is in progress in this process: wait for its end, or start this one in "
            "another process"
        )
    num_threads = _num_torch_threads()
    try:
        with quiet_libraries(), restored_environment():
            ranks.adopt_slurm_variables()
            yield
    finally:
        _free_memory()
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        _is_running.release()


def _num_torch_threads() -> int | None:
    """Returns the threads of PyTorch that the caller uses, None if PyTorch is not imported."""
    if "torch" not in sys.modules:
        return None
    import torch

    return torch.get_num_threads()


def _free_memory() -> None:
    """Frees the models and optimizer states of a run, which are in reference cycles."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_config(config: Config, overrides: Overrides | None, kind: type[Section]) -> Any:
    """Returns the validated config of a stage. `logging.progress` is off unless it is set.

    Args:
        config: Path of a YAML file, a dict or a config object.
        overrides: Values that replace those of the config, by dotted key.
        kind: The class of the config.

    Raises:
        UserError: The config or an override is wrong.
    """
    source = "config"
    if isinstance(config, Section):
        tree = config.model_dump(mode="json", exclude_unset=True)
    elif isinstance(config, Mapping):
        tree = _plain(config, source)
        _require_nested_keys(tree)
    elif isinstance(config, str | os.PathLike):
        source = os.fspath(config)
        tree = read_yaml(source)
    else:
        raise UserError(
            f"config: expected the path of a YAML file, a dict or a config object, got {config!r}"
        )
    if overrides is not None:
        tree = replace_values(tree, _plain(overrides, "overrides"))
    if "logging" in kind.model_fields:
        logging = tree.setdefault("logging", {})
        if isinstance(logging, dict):
            logging.setdefault("progress", "off")
    return configs.parse(tree, source, kind)


def _require_nested_keys(tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if "." in key:
            section, _, leaf = key.partition(".")
            raise UserError(
                f"config: {key}: the sections of a config are dicts, {{{section!r}: {{{leaf!r}: "
                f"{value!r}}}}}. Dotted keys are for overrides"
            )


def _plain(value: Any, key: str) -> Any:
    """Returns a value of a config with paths as strings, and mappings as dicts.

    Raises:
        UserError: A key of a dict is not a name, or is a dotted key.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if not isinstance(value, Mapping):
        return value
    tree = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise UserError(
                f"{key}: expected names as keys, got {name!r}. A function of yours is named by its "
                "file: 'my_rewards:brevity' or 'path/to/file.py:brevity'"
            )
        tree[name] = _plain(item, f"{key}.{name}")
    return tree
