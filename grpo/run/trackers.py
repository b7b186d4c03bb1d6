"""Sends a run's metrics and completions to experiment trackers: TensorBoard, W&B and trackio.

A tracker receives the numbers and histograms of a row of metrics, and a table with the first
completions of the step. A tracker that fails does not stop the run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from grpo.types import UserError, first_line

MAX_FAILURES = 3  # consecutive ones, after which a tracker receives nothing more
MAX_TEXT_CHARS = 2000  # of a question or a completion
TABLE_KEY = "samples"
TABLE_COLUMNS = ("problem", "question", "completion", "reward", "verdict")
# Control characters other than tabulators and line feeds, and lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """The run as trackers show it.

    Attributes:
        project: The project that groups runs in W&B and trackio.
        run_dir: The run directory. Its name is the name of the run.
        run_id: Identifies the run for its whole life: a resumed run continues its curves, and no
            two runs share one.
        config: The resolved config as nested dicts.
        is_resumed: Whether an earlier process has started the run.
        num_samples: Number of completions per step in the table.
    """

    project: str
    run_dir: Path
    run_id: str
    config: dict[str, Any]
    is_resumed: bool = False
    num_samples: int = 0


class Histogram(NamedTuple):
    """Counts per bin, and one more edge than bins: `Histogram([3, 1], [0.0, 0.5, 1.0])`."""

    counts: list[int]
    edges: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedStep:
    """What the trackers receive about a step.

    Attributes:
        step: The step.
        numbers: The metrics that are numbers, by name.
        histograms: The histograms by name of the metric; none is empty.
        samples: A row per completion, with a cell per column of `TABLE_COLUMNS`.
    """

    step: int
    numbers: dict[str, float]
    histograms: dict[str, Histogram]
    samples: list[list[Any]]


@dataclass(slots=True)
class _Tracker:
    name: str
    log: Callable[[TrackedStep], None]
    close: Callable[[], None]
    num_failures: int = field(default=0)  # since the last success


class Trackers:
    """The trackers of `logging.trackers`. A context manager, which closes them at its end."""

    def __init__(
        self, names: Sequence[str], run: TrackedRun, say: Callable[[str], None] = print
    ) -> None:
        """Opens the trackers: "tensorboard", "wandb", "trackio".

        Args:
            names: The names of the trackers.
            run: The run as they show it.
            say: Receives a line if a tracker fails later, or if it cannot be opened for a run that
                is resumed.

        Raises:
            UserError: A tracker is not installed, or it cannot be opened for a new run.
        """
        self._say = say
        self._run = run
        self._trackers: list[_Tracker] = []
        self._open(names, is_resumed=run.is_resumed)

    def _open(self, names: Sequence[str], *, is_resumed: bool) -> None:
        for name in names:
            try:
                self._trackers.append(_OPENERS[name](self._run))
            except ImportError as error:
                self._close_all()
                raise UserError(
                    f"logging.trackers: {name} is not installed ({error}): pip install {name}"
                ) from None
            # Errors of the network, of a login and of other libraries. Some end the process.
            except (Exception, SystemExit) as error:
                message = f"logging.trackers: {name} cannot be opened: {_describe(error)}"
                if not is_resumed:
                    self._close_all()
                    raise UserError(f"{message}. Correct this, or remove {name}") from None
                self._say(f"{message}. The run continues without it")

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Closes the trackers within the context, so that another run can open its own.

        W&B and trackio have one open run per process.
        """
        names = [tracker.name for tracker in self._trackers]
        self._close_all()
        yield
        self._open(names, is_resumed=True)

    @property
    def num_samples(self) -> int:
        """The number of completions per step that `log` can use; 0 without trackers."""
        return self._run.num_samples if self._trackers else 0

    def log(self, row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Sends the numbers and histograms of a row of metrics, and completions, to every tracker.

        TensorBoard and W&B also receive the row's step; trackio counts the calls itself. A failure
        is reported. After `MAX_FAILURES` consecutive failures, a tracker receives nothing more.

        Args:
            row: The metrics with their `step`. Lists under `histogram/` are counts per bin.
            samples: Completions as rows of samples/.
        """
        step = TrackedStep(
            step=int(row["step"]),
            numbers={key: value for key, value in row.items() if isinstance(value, (int, float))},
            histograms=_histograms(row),
            samples=[_table_row(sample) for sample in samples],
        )
        for tracker in list(self._trackers):
            try:
                tracker.log(step)
                tracker.num_failures = 0
            except (Exception, SystemExit) as error:  # of the network, a disk or the tracker
                self._report_failure(tracker, step.step, error)

    def _report_failure(self, tracker: _Tracker, step: int, error: BaseException) -> None:
        tracker.num_failures += 1
        message = f"logging.trackers: {tracker.name} failed in step {step}: {_describe(error)}"
        if tracker.num_failures < MAX_FAILURES:
            self._say(message)
            return
        self._say(f"{message}. It receives nothing more; metrics.jsonl has all steps")
        self._trackers.remove(tracker)
        self._close(tracker)

    def _close_all(self) -> None:
        for tracker in self._trackers:
            self._close(tracker)
        self._trackers.clear()

    def _close(self, tracker: _Tracker) -> None:
        try:
            tracker.close()
        except (Exception, SystemExit) as error:
            self._say(f"logging.trackers: {tracker.name} cannot be closed: {_describe(error)}")

    def __enter__(self) -> Trackers:
        """Returns the trackers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes every tracker."""
        self._close_all()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# --- histograms and tables


def _histograms(row: Mapping[str, Any]) -> dict[str, Histogram]:
    """Returns the histograms of a row of metrics that are not empty."""
    histograms = {}
    for key, counts in row.items():
        if key.startswith("histogram/") and isinstance(counts, list) and sum(counts) > 0:
            histograms[key] = Histogram(counts, _edges(key, len(counts)))
    return histograms


def _edges(key: str, num_bins: int) -> list[float]:
    """Returns the edges of the bins of a histogram, see docs/metrics.md."""
    indices = range(num_bins + 1)
    if key == "histogram/length":  # 2^i to 2^(i + 1) - 1 tokens
        return [2.0**index for index in indices]
    if key == "histogram/advantage":  # bins of 0.5 with centers from -4
        return [(index - 0.5) / 2 - 4 for index in indices]
    return [index - 0.5 for index in indices]  # whole numbers from 0


def _table_row(sample: Mapping[str, Any]) -> list[Any]:
    return [
        _readable(str(sample["problem"])),
        _readable(str(sample["question"])),
        _readable(str(sample["completion"])),
        sample["reward"],
        sample["verdict"],
    ]


def _readable(text: str) -> str:
    """Returns a text without characters that trackers cannot store, shortened in its middle."""
    if len(text) > MAX_TEXT_CHARS:
        half = MAX_TEXT_CHARS // 2
        num_omitted = len(text) - 2 * half
        text = f"{text[:half]}\n[... {num_omitted:,} characters ...]\n{text[-half:]}"
    return UNPRINTABLE.sub("\ufffd", text)


# --- the trackers


def _open_tensorboard(run: TrackedRun) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.run_dir / "tensorboard"))

    def log(step: TrackedStep) -> None:
        for key, value in step.numbers.items():
            writer.add_scalar(key, value, step.step)
        for key, histogram in step.histograms.items():
            writer.add_histogram_raw(key, **_raw_histogram(histogram), global_step=step.step)
        if step.samples:
            writer.add_text(TABLE_KEY, _markdown(step.samples), step.step)

    return _Tracker("tensorboard", log, writer.close)


def _raw_histogram(histogram: Histogram) -> dict[str, Any]:
    """Returns the arguments of TensorBoard's `add_histogram_raw`.

    The sums are those of the centers of the bins.
    """
    counts, edges = histogram
    filled = [index for index, count in enumerate(counts) if count]
    total = 0.0
    total_squares = 0.0
    for index, count in enumerate(counts):
        center = (edges[index] + edges[index + 1]) / 2
        total += count * center
        total_squares += count * center**2
    return {
        "min": edges[filled[0]],
        "max": edges[filled[-1] + 1],
        "num": sum(counts),
        "sum": total,
        "sum_squares": total_squares,
        "bucket_limits": edges[1:],
        "bucket_counts": counts,
    }


def _markdown(samples: Sequence[Sequence[Any]]) -> str:
    """Returns completions as Markdown. Indented text is shown unchanged, whatever it contains."""
    parts = []
    for problem, question, completion, reward, verdict in samples:
        number = "none" if reward is None else f"{reward:.3g}"
        heading = f"    {problem}: reward {number}, {verdict or 'no verdict'}"
        lines = f"{question}\n\n{completion}".split("\n")
        text = "\n".join(f"    {line}" for line in lines)
        parts.append(f"{heading}\n\n{text}")
    return "\n\n---\n\n".join(parts)


def _open_wandb(run: TrackedRun) -> _Tracker:
    import wandb

    wandb_run = wandb.init(
        project=run.project,
        name=run.run_dir.name,
        dir=str(run.run_dir),
        config=run.config,
        resume="allow",
        id=run.run_id,
    )

    def log(step: TrackedStep) -> None:
        wandb_run.log(_with_media(step, wandb), step=step.step)

    return _Tracker("wandb", log, wandb_run.finish)


def _open_trackio(run: TrackedRun) -> _Tracker:
    import trackio

    # trackio identifies a run by its name.
    trackio.init(
        project=run.project,
        name=f"{run.run_dir.name}-{run.run_id}",
        config=run.config,
        resume="allow",
    )

    def log(step: TrackedStep) -> None:
        trackio.log(_with_media(step, trackio))

    return _Tracker("trackio", log, trackio.finish)


def _with_media(step: TrackedStep, library: Any) -> dict[str, Any]:
    """Returns the numbers, histograms and table of a step for W&B or trackio.

    Early versions of trackio have no class `Histogram`.
    """
    values: dict[str, Any] = dict(step.numbers)
    if hasattr(library, "Histogram"):
        for key, histogram in step.histograms.items():
            values[key] = library.Histogram(np_histogram=tuple(histogram))
    if step.samples and hasattr(library, "Table"):
        values[TABLE_KEY] = library.Table(columns=list(TABLE_COLUMNS), data=step.samples)
    return values


_OPENERS: dict[str, Callable[[TrackedRun], _Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
