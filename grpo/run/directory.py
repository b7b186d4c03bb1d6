"""The run directory and its checkpoints.

    runs/NAME/
        config.yaml  manifest.json  metrics.jsonl
        samples/step-000010.jsonl
        checkpoints/step-000020/
        final/

Files and directories are written under another name and then renamed, so a file that has its final
name is complete. Checkpoints and models are flushed to disk before that. metrics.jsonl is appended
to; its reader ignores an incomplete last line.

A step is a rollout, or an update in supervised training. A checkpoint is written between steps. It
contains the learner's state and state.json, which for `grpo train` has the position in the data,
carried groups and pass rates. Seeds and weight versions follow from the number of rollouts. After a
resume, the engine receives the learner's weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, ParamSpec

import numpy as np

from grpo import json_lines
from grpo.run import ranks
from grpo.run.sample_columns import columns_of, samples_of
from grpo.types import RunError, Sample, UserError, first_line

Parameters = ParamSpec("Parameters")


def scratch_path(target: Path) -> Path:
    """Returns the directory that `replace_directory` fills before it is renamed to `target`."""
    return target.with_name(f".{target.name}.partial")


def _on_rank0(method: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Decorator: runs the method on rank 0 only."""

    @functools.wraps(method)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        if ranks.rank() == 0:
            method(*args, **kwargs)

    return run


@contextlib.contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory next to `target`, which becomes `target` at the end of the context.

    It is flushed to disk before it is renamed. If the context raises, `target` is unchanged.
    """
    scratch = scratch_path(target)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _flush_tree(scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    old = _trash_path(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)


def _trash_path(directory: Path) -> Path:
    """Returns the name that a directory has while it is removed."""
    return directory.with_name(f".{directory.name}.old")


def write_file(path: Path, text: str) -> None:
    """Replaces the text of a file. Other processes read the old or the new text, never a mix."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    _flush(scratch)
    scratch.rename(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, an empty list if the file does not exist.

    An incomplete last line, left by a killed process, is skipped.
    """
    if not path.exists():
        return []
    return json_lines.read_objects(path, skip_incomplete=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest.json of the run in a folder, an empty dict if it does not exist.

    Raises:
        UserError: It cannot be read, or is no JSON object.
    """
    file = folder / "manifest.json"
    try:
        if not file.exists():
            return {}
        manifest: dict[str, Any] = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{file}: expected a JSON object")
    return manifest


def read_update_samples(folder: Path, step: int) -> list[Sample]:
    """Returns the samples of a step's updates, which `RunDirectory.write_update_samples` has kept.

    Raises:
        UserError: The samples of this step were not kept.
    """
    file = folder / "samples" / f"step-{step:06d}.npz"
    if not file.exists():
        steps = [_number_of(kept_file) for kept_file in sorted(file.parent.glob("step-*.npz"))]
        raise UserError(
            f"{folder}: step {step} was not kept for a replay. Available: {steps}. "
            "logging.replay sets how many steps are kept"
        )
    with np.load(file) as arrays:
        columns = {name: arrays[name].tolist() for name in arrays.files}
    return samples_of(columns)


def _number_of(path: Path) -> int:
    """Returns the number in a name such as step-000010.npz."""
    return int(path.stem.partition("-")[2])


class RunDirectory:
    """The files of one run.

    Rank 0 locks the directory until `close`, and writes all files except the other ranks' parts of
    a checkpoint and their logs. All ranks read.
    """

    def __init__(self, path: str, *, resume: bool) -> None:
        """Opens the run directory. Rank 0 creates and locks it.

        Raises:
            UserError: The directory holds a run and `resume` is not set, it holds no run to resume,
                it cannot be written, another process works on it, or a rank has no access to it.
        """
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"
        self.manifest = self.path / "manifest.json"
        self._lock: IO[str] | None = None  # on rank 0, until `close`

        def open_or_check() -> None:
            if ranks.rank() == 0:
                self._open(resume)
            else:
                self._check_shared()

        ranks.rank0_first("the run directory", open_or_check)

    def _open(self, resume: bool) -> None:
        if self.manifest.exists() and not resume:
            raise UserError(
                f"run_dir={self.path}: the directory already holds a run: continue it with "
                "--resume (in Python: resume=True), or choose another run_dir"
            )
        if resume and not self.manifest.exists():
            raise UserError(f"run_dir={self.path}: there is no run to resume")
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"run_dir={self.path}: another process is working on this run"
            ) from None
        # A process that was killed in `save_checkpoint` or `prune_checkpoints` may have left these.
        for pattern in (".*.partial", ".*.old"):
            for leftover in list(self.checkpoints.glob(pattern)):
                shutil.rmtree(leftover)

    def close(self) -> None:
        """Unlocks the directory, so that another run of any process can open it."""
        if self._lock is not None:
            self._lock.close()

    def _check_shared(self) -> None:
        """Raises UserError if this rank cannot access the directory that rank 0 has created."""
        if not self.samples.exists():
            raise UserError(
                f"run_dir={self.path}: rank {ranks.rank()} cannot access the directory: put it on "
                "a file system that all nodes share"
            )

    def log_file(self, name: str) -> Path:
        """Returns the log file `name` of this rank: NAME.log, or logs/NAME-RANK.log."""
        if ranks.rank() == 0:
            return self.path / f"{name}.log"
        return self.path / f"logs/{name}-{ranks.rank()}.log"

    @staticmethod
    def status(folder: Path) -> str | None:
        """Returns the status of the run in a folder, e.g. "finished". None if there is no run."""
        return read_manifest(folder).get("status")

    def has_results(self) -> bool:
        """Returns whether the run has results to keep.

        Results are rows of metrics, a run in a subdirectory (a stage of a pipeline), or a quantized
        model.
        """
        if self.metrics.exists():
            return True
        for pattern in ("*/manifest.json", "int*/config.json"):
            if any(self.path.glob(pattern)):
                return True
        return False

    @_on_rank0
    def discard(self) -> None:
        """Removes manifest and models of a run without results, so that it can be started again."""
        self.manifest.unlink(missing_ok=True)
        (self.path / "chat_template.jinja").unlink(missing_ok=True)
        for name in ("model", "warm_start"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @_on_rank0
    def update_manifest(self, **entries: Any) -> None:
        """Merges entries into manifest.json."""
        manifest = {**self.read_manifest(), **entries}
        write_file(self.manifest, json.dumps(manifest, indent=2) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """Returns the contents of manifest.json, an empty dict if it does not exist."""
        return read_manifest(self.path)

    @_on_rank0
    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl.

        A number that is not finite becomes null, because JSON has no NaN and no infinity.
        """
        json_row = dict(row)
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                json_row[key] = None
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json_lines.to_line(json_row))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl, an empty list if it does not exist."""
        return read_metrics(self.metrics)

    @_on_rank0
    def write_samples(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Writes `samples/NAME.jsonl`, one JSON object per row."""
        write_file(self.samples / f"{name}.jsonl", json_lines.to_lines(rows))

    def first_samples(self, step: int, count: int) -> list[dict[str, Any]]:
        """Returns the first completions of a step, at most `count`. [] if the step has none."""
        for name in (f"step-{step:06d}", f"chunk-{step:06d}"):
            file = self.samples / f"{name}.jsonl"
            if count > 0 and file.exists():
                return [row for _, row in itertools.islice(json_lines.read(file), count)]
        return []

    @_on_rank0
    def write_update_samples(self, step: int, samples: Sequence[Sample], keep: int) -> None:
        """Writes the samples of a step's updates to `samples/step-NUMBER.npz`, for `grpo replay`.

        Args:
            step: The step.
            samples: The samples of all its updates.
            keep: The number of steps whose files are kept; older ones are removed. With 0, nothing
                is written.
        """
        if not keep:
            return
        target = self.samples / f"step-{step:06d}.npz"
        scratch = target.with_name(f".{target.name}")  # np.savez appends .npz to any other suffix
        np.savez_compressed(scratch, **columns_of(samples))
        scratch.rename(target)
        for old in sorted(self.samples.glob("step-*.npz"))[:-keep]:
            old.unlink()

    def remove_after(self, step: int) -> None:
        """Removes the metrics and samples after a step. All ranks call it.

        A run that is resumed from a checkpoint repeats the steps after it. On a CPU they give the
        same results.
        """
        if ranks.rank() == 0:
            rows = [row for row in self.read_metrics() if row["step"] <= step]
            write_file(self.metrics, json_lines.to_lines(rows))
            for file in self.samples.glob("*-*.*"):
                number = file.stem.rpartition("-")[2]
                if number.isdecimal() and int(number) > step:
                    file.unlink()
        ranks.all_gather("the removal of later steps", None)

    def last_checkpoint(self) -> Path | None:
        """Returns the checkpoint of the last step, None if there is no checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def read_last_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """Returns the last checkpoint and its state, (None, {}) without a checkpoint.

        All ranks return the values that rank 0 reads.

        Raises:
            RunError: The checkpoint is damaged.
        """

        def read() -> tuple[Path | None, dict[str, Any]]:
            checkpoint = self.last_checkpoint() if ranks.rank() == 0 else None
            if checkpoint is None:
                return None, {}
            return checkpoint, self.read_checkpoint_state(checkpoint)

        return ranks.all_gather_or_raise("the last checkpoint", read)[0]

    def save_checkpoint(
        self, step: int, state: dict[str, Any], write: Callable[[Path], None]
    ) -> Path:
        """Writes the checkpoint of a step and returns its directory. All ranks call it.

        Args:
            step: The step.
            state: JSON values, written to state.json with the step, a hash of every file, and the
                size and duration of the checkpoint in `bytes` and `seconds`.
                `prune_checkpoints` reads `metrics` from it.
            write: Called as `write(directory)` on all ranks; writes this rank's files.

        Raises:
            RunError: The checkpoint cannot be written, e.g. because the disk is full. Earlier
                checkpoints are not affected.
        """
        target = self.checkpoints / f"step-{step:06d}"
        if ranks.rank() == 0:
            self._save_on_rank0(target, {**state, "step": step}, write)
        else:
            ranks.all_gather("the checkpoint's directory", None)
            write(scratch_path(target))
            ranks.all_gather("the other ranks' parts of the checkpoint", None)
        ranks.all_gather("the checkpoint's end", None)
        return target

    def _save_on_rank0(
        self, target: Path, state: dict[str, Any], write: Callable[[Path], None]
    ) -> None:
        start = time.monotonic()
        try:
            with replace_directory(target) as scratch:
                ranks.all_gather("the checkpoint's directory", None)
                write(scratch)
                ranks.all_gather("the other ranks' parts of the checkpoint", None)
                hashes = _file_hashes(scratch)
                sizes = [(scratch / name).stat().st_size for name in hashes]
                state = {
                    **state,
                    "files": hashes,
                    "bytes": sum(sizes),
                    "seconds": time.monotonic() - start,
                }
                text = json.dumps(state, default=dataclass_fields)
                (scratch / "state.json").write_text(text)
        except RunError:  # a RuntimeError, which must not be caught below
            raise
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            raise RunError(
                f"checkpoint {target} could not be written ({first_line(error)}): is the "
                f"disk full? Last good checkpoint: {self.last_checkpoint() or 'none'}"
            ) from error

    def read_checkpoint_state(self, checkpoint: Path) -> dict[str, Any]:
        """Returns the state of a checkpoint after verifying the hash of every file.

        DeepSpeed's files are pickles, which run code when they are loaded, and it finds them by
        pattern. A file that state.json does not list is therefore an error.

        Raises:
            RunError: A file is missing, differs from its hash or is not listed; the message names
                it.
        """
        state_file = checkpoint / "state.json"
        try:
            state: dict[str, Any] = json.loads(state_file.read_text())
        except (OSError, ValueError):
            raise _damaged(state_file, checkpoint) from None
        for name, expected_hash in state["files"].items():
            file = checkpoint / name
            if not file.is_file() or _hash(file) != expected_hash:
                raise _damaged(file, checkpoint)
        for path in sorted(checkpoint.rglob("*")):
            name = str(path.relative_to(checkpoint))
            if not path.is_dir() and name not in state["files"] and name != state_file.name:
                raise RunError(
                    f"{path} is not a file of this checkpoint (state.json lists them): remove it"
                )
        return state

    @_on_rank0
    def keep_checkpoint(self, checkpoint: Path, name: str) -> None:
        """Keeps a checkpoint as `kept/NAME`, where `prune_checkpoints` does not remove it.

        Its files are hard links, which need no additional space.
        """
        with replace_directory(self.path / "kept" / name) as scratch:
            shutil.copytree(checkpoint, scratch, copy_function=os.link, dirs_exist_ok=True)

    @_on_rank0
    def prune_checkpoints(self, keep_last: int, keep_best: str | None) -> None:
        """Removes all checkpoints except the last ones and the best one.

        Args:
            keep_last: The number of last checkpoints that are kept.
            keep_best: The metric whose highest value makes a checkpoint the best one; None keeps
                the last ones only.
        """
        checkpoints = sorted(self.checkpoints.glob("step-*"))
        kept = set(checkpoints[-keep_last:])
        if keep_best:
            best = _best_checkpoint(checkpoints, keep_best)
            if best is not None:
                kept.add(best)
        for checkpoint in checkpoints:
            if checkpoint not in kept:
                # Renamed first, so that no partly removed directory has a checkpoint's name.
                trash = _trash_path(checkpoint)
                checkpoint.rename(trash)
                shutil.rmtree(trash)


def _best_checkpoint(checkpoints: Sequence[Path], metric: str) -> Path | None:
    """Returns the first checkpoint with the highest value of a metric, None if none has one."""
    best: Path | None = None
    best_value = -math.inf
    for checkpoint in checkpoints:
        value = json.loads((checkpoint / "state.json").read_text())["metrics"].get(metric)
        if value is not None and math.isfinite(value) and value > best_value:
            best = checkpoint
            best_value = value
    return best


def _damaged(file: Path, checkpoint: Path) -> RunError:
    return RunError(
        f"{file} is missing or damaged: remove {checkpoint} to resume from the one before it"
    )


def _file_hashes(directory: Path) -> dict[str, str]:
    """Returns the hash of every file in a directory tree, by relative path."""
    hashes = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            hashes[str(file.relative_to(directory))] = _hash(file)
    return hashes


def dataclass_fields(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name: `json.dumps(..., default=dataclass_fields)`."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _flush(path)


def _flush(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
