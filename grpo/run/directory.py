"""The run directory and its checkpoints: written aside, flushed to disk, renamed.

What has its final name is whole.

    runs/NAME/
        config.yaml  manifest.json  metrics.jsonl
        samples/step-000010.jsonl
        checkpoints/step-000020/
        final/

A checkpoint is taken between rollouts. Every seed and the engine's weights are functions of the
number of rollouts done and need no files; the position in the data, carried groups and pass rates
are in state.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from grpo.run import ranks
from grpo.types import RunError, Sample, UserError


def scratch_of(target: Path) -> Path:
    """Returns the directory that `replace_directory` writes into."""
    return target.with_name(f".{target.name}.partial")


def _by_rank_0(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def run(*arguments: Any, **named: Any) -> None:
        if ranks.rank() == 0:
            method(*arguments, **named)

    return run


@contextlib.contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target`.

    When the block ends, the directory is flushed and renamed to `target`. On an error nothing
    changes.
    """
    scratch = scratch_of(target)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _flush(scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _flush_file(target.parent)


def write_file(path: Path, text: str) -> None:
    """Replaces a file's text so that a reader sees the old or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    _flush_file(scratch)
    scratch.rename(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a metrics.jsonl, none without a file.

    A killed writer may have left half a line.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what a run's manifest.json says, nothing where there is none."""
    file = folder / "manifest.json"
    return json.loads(file.read_text()) if file.exists() else {}


def read_update(folder: Path, step: int) -> list[Sample]:
    """Returns the samples of a step's updates, as `RunDirectory.write_update` kept them.

    Raises UserError when it did not.
    """
    file = folder / "samples" / f"step-{step:06d}.npz"
    if not file.exists():
        have = [int(path.stem.partition("-")[2]) for path in sorted(file.parent.glob("step-*.npz"))]
        raise UserError(
            f"{folder}: step {step} was not kept for a replay; have {have} (logging.replay)"
        )
    with np.load(file) as columns:
        held = {name: columns[name].tolist() for name in columns.files}
    if "token_versions" not in held:  # of an older run: one a sample
        sizes = zip(held["lengths"], held["prompts"], held["versions"], strict=True)
        held["token_versions"] = [
            version for length, prompt, version in sizes for _ in range(length - prompt)
        ]
    samples, token, place = [], 0, 0
    for i, (length, prompt) in enumerate(zip(held["lengths"], held["prompts"], strict=True)):
        own = slice(place, place + length - prompt)
        samples.append(
            Sample(
                token_ids=tuple(held["ids"][token : token + length]),
                prompt_length=prompt,
                advantages=tuple(held["advantages"][own]),
                sampler_logprobs=tuple(held["logprobs"][own]) or None,
                versions=tuple(held["token_versions"][own]) or None,
                group=held["groups"][i],
                reward=held["rewards"][i],
            )
        )
        token, place = token + length, own.stop
    return samples


class RunDirectory:
    """One run's files.

    Holds a lock on the directory for as long as the process lives. Only rank 0 writes; the others
    see and read.
    """

    def __init__(self, path: str, *, resume: bool) -> None:
        """Opens the run directory; rank 0 creates and locks it.

        Raises UserError if there is a run already and `resume` is not set, if there is no run to
        resume, or if another process works on it.
        """
        self.path = Path(path)
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.metrics, self.manifest = self.path / "metrics.jsonl", self.path / "manifest.json"
        ranks.rank0_first(
            "the run directory",
            lambda: self._open(path, resume) if ranks.rank() == 0 else self._see(path),
        )

    def _see(self, path: str) -> None:
        if not self.samples.exists():
            raise UserError(
                f"run_dir={path}: not seen by rank {ranks.rank()}: it has to be on a file system "
                "that all nodes share"
            )

    def log_file(self, name: str) -> Path:
        """Returns where this rank's `name` writes what it has to say."""
        return self.path / (
            f"{name}.log" if ranks.rank() == 0 else f"logs/{name}-{ranks.rank()}.log"
        )

    def _open(self, path: str, resume: bool) -> None:
        if self.manifest.exists() and not resume:
            raise UserError(
                f"run_dir={path}: there is a run in it: go on with --resume, or choose another "
                "run_dir"
            )
        if resume and not self.manifest.exists():
            raise UserError(f"run_dir={path}: there is no run to resume")
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run_dir={path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run_dir={path}: another process is working on this run") from None
        # of a killed save or prune
        for leftover in [*self.checkpoints.glob(".*.partial"), *self.checkpoints.glob(".*.old")]:
            shutil.rmtree(leftover)

    @staticmethod
    def status(folder: Path) -> str | None:
        """Returns how the run in a folder ended, None when there is none."""
        return read_manifest(folder).get("status")

    def began(self) -> bool:
        """Returns whether anything was done that is worth keeping.

        That is a step, a part of the stage in a folder of its own, or a quantised model.
        """
        return self.metrics.exists() or any(
            next(self.path.glob(name), None) for name in ("*/manifest.json", "int*/config.json")
        )

    @_by_rank_0
    def clear(self) -> None:
        """Forgets a run that never began."""
        self.manifest.unlink(missing_ok=True)
        for name in ("model", "warm_start"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @_by_rank_0
    def update_manifest(self, **entries: Any) -> None:
        """Merges entries into manifest.json."""
        write_file(self.manifest, json.dumps(self.read_manifest() | entries, indent=2) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """Returns the contents of manifest.json, an empty dict if there is no such file."""
        return read_manifest(self.path)

    @_by_rank_0
    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one object.

        A number that is not finite is written as null, which every JSON reader knows.
        """
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the complete lines of metrics.jsonl, an empty list if there is no such file."""
        return read_metrics(self.metrics)

    @_by_rank_0
    def write_samples(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Replaces `samples/NAME.jsonl` by one JSON object per row."""
        write_file(
            self.samples / f"{name}.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )

    @_by_rank_0
    def write_update(self, step: int, samples: Sequence[Sample], keep: int) -> None:
        """Writes the samples that a step's updates are made from, for `grpo replay`.

        It removes all such files but the last `keep`. With `keep` 0 it does nothing.
        """
        if not keep:
            return
        columns: dict[str, Any] = {
            "lengths": [len(sample.token_ids) for sample in samples],
            "prompts": [sample.prompt_length for sample in samples],
            "groups": [sample.group for sample in samples],
            "rewards": [sample.reward for sample in samples],
            "token_versions": np.array(
                [version for sample in samples for version in sample.versions or ()], dtype=np.int32
            ),
            "ids": np.array(
                [token for sample in samples for token in sample.token_ids], dtype=np.uint32
            ),
        }
        for name, values in (
            ("advantages", [s.advantages for s in samples]),
            ("logprobs", [s.sampler_logprobs or () for s in samples]),
        ):
            # as a batch holds them
            columns[name] = np.array([value for row in values for value in row], dtype=np.float32)
        target = self.samples / f"step-{step:06d}.npz"
        scratch = target.with_name(f".{target.name}")
        np.savez_compressed(scratch, **columns)
        scratch.rename(target)
        for old in sorted(self.samples.glob("step-*.npz"))[:-keep]:
            old.unlink()

    def cut(self, step: int) -> None:
        """Drops metrics and samples of work after a checkpoint, which will be done again.

        On a CPU the repeated work gives the same results.
        """
        if ranks.rank() == 0:
            kept = [row for row in self.read_metrics() if row["step"] <= step]
            write_file(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
            for file in self.samples.glob("*-*.*"):
                number = file.stem.rpartition("-")[2]
                if number.isdecimal() and int(number) > step:
                    file.unlink()
        ranks.all_gather("the cut", None)

    def latest(self) -> Path | None:
        """Returns the checkpoint of the last step."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def last_state(self) -> tuple[Path | None, dict[str, Any]]:
        """Returns the last checkpoint and its state, on all ranks what rank 0 sees.

        Raises RunError for one that is damaged.
        """

        def read() -> tuple[Path | None, dict[str, Any]]:
            found = self.latest() if ranks.rank() == 0 else None
            return found, self.read_state(found) if found else {}

        return ranks.all_gather_or_raise("the last checkpoint", read)[0]

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Writes checkpoint `step`.

        It holds whatever `write(directory)` puts there, and `state` with a hash of every file.

        All ranks write into it together. Raises RunError when it cannot be written (a full disk);
        earlier checkpoints are whole then.
        """
        target = self.checkpoints / f"step-{step:06d}"
        if ranks.rank() > 0:
            ranks.all_gather("the checkpoint's directory", None)
            write(scratch_of(target))
            ranks.all_gather("the other ranks' parts of the checkpoint", None)
            ranks.all_gather("the checkpoint's end", None)
            return target
        try:
            with replace_directory(target) as scratch:
                ranks.all_gather("the checkpoint's directory", None)
                write(scratch)
                ranks.all_gather("the other ranks' parts of the checkpoint", None)
                hashes = {
                    str(file.relative_to(scratch)): _hash(file)
                    for file in sorted(scratch.rglob("*"))
                    if file.is_file()
                }
                (scratch / "state.json").write_text(
                    json.dumps(state | {"step": step, "files": hashes}, default=_fields)
                )
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            if isinstance(error, RunError):
                raise
            last_good = self.latest() or "none"
            raise RunError(
                f"checkpoint {target} could not be written ({str(error).splitlines()[0]}): is the "
                f"disk full? Last good checkpoint: {last_good}"
            ) from error
        ranks.all_gather("the checkpoint's end", None)
        return target

    def read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Returns a checkpoint's state after comparing every file with its hash.

        Raises RunError naming the first that differs.
        """
        try:
            state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        except (OSError, ValueError):
            raise RunError(
                f"{checkpoint / 'state.json'} is missing or damaged: remove {checkpoint} to "
                "resume from the one before it"
            ) from None
        for name, expected in state["files"].items():
            if not (checkpoint / name).is_file() or _hash(checkpoint / name) != expected:
                raise RunError(
                    f"{checkpoint / name} is missing or damaged: remove {checkpoint} to resume "
                    "from the one before it"
                )
        return state

    @_by_rank_0
    def keep(self, checkpoint: Path, name: str) -> None:
        """Keeps a checkpoint, whatever is pruned, as `kept/NAME`: linked, not copied."""
        with replace_directory(self.path / "kept" / name) as scratch:
            shutil.copytree(checkpoint, scratch, copy_function=os.link, dirs_exist_ok=True)

    @_by_rank_0
    def prune(self, keep_last: int, keep_best: str | None) -> None:
        """Removes all checkpoints but the last `keep_last` and the best one.

        The best one is the checkpoint whose state has the highest metric `keep_best`.
        """
        found = sorted(self.checkpoints.glob("step-*"))
        kept = set(found[-keep_last:])
        if keep_best:
            values = {
                path: json.loads((path / "state.json").read_text())["metrics"].get(keep_best)
                for path in found
            }
            known = [
                path for path in found if values[path] is not None and math.isfinite(values[path])
            ]
            kept |= {max(known, key=lambda path: values[path])} if known else set()
        for path in found:
            if path not in kept:
                trash = path.with_name(f".{path.name}.old")
                path.rename(trash)  # at once: no half-removed directory has a checkpoint's name
                shutil.rmtree(trash)


def _fields(value: Any) -> dict[str, Any]:
    """Returns a dataclass as json writes it, field by field: the groups that a state holds."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _flush_file(path)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
