"""Sends a run's metrics to experiment trackers: TensorBoard, W&B and trackio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """The run as trackers show it.

    Attributes:
        project: The project that groups runs in W&B and trackio.
        run_dir: The run directory. Its name is the name of the run.
        run_id: Identifies the run for its whole life: a resumed run continues its curves, and no
            two runs share one.
        config: The resolved config as nested dicts.
    """

    project: str
    run_dir: Path
    run_id: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Tracker:
    log: Callable[[dict[str, float], int], None]  # (metrics, step)
    close: Callable[[], None]


class Trackers:
    """The trackers of `logging.trackers`. A context manager, which closes them at its end."""

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        """Opens the trackers: "tensorboard", "wandb", "trackio".

        Raises:
            UserError: A tracker is not installed.
        """
        self._trackers: list[_Tracker] = []
        for name in names:
            try:
                self._trackers.append(_OPENERS[name](run))
            except ImportError as error:
                raise UserError(
                    f"logging.trackers: {name} is not installed ({error}): pip install {name}"
                ) from None

    def log(self, row: dict[str, Any]) -> None:
        """Sends the numbers in a row of metrics to every tracker.

        TensorBoard and W&B also receive the row's step; trackio counts the calls itself.
        """
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.log(numbers, int(row["step"]))

    def __enter__(self) -> Trackers:
        """Returns the trackers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close()


def _open_tensorboard(run: TrackedRun) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.run_dir / "tensorboard"))

    def log(metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return _Tracker(log, writer.close)


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

    def log(metrics: dict[str, float], step: int) -> None:
        wandb_run.log(metrics, step=step)

    return _Tracker(log, wandb_run.finish)


def _open_trackio(run: TrackedRun) -> _Tracker:
    import trackio

    # trackio identifies a run by its name.
    trackio.init(
        project=run.project,
        name=f"{run.run_dir.name}-{run.run_id}",
        config=run.config,
        resume="allow",
    )

    def log(metrics: dict[str, float], step: int) -> None:
        trackio.log(metrics)

    return _Tracker(log, trackio.finish)


_OPENERS: dict[str, Callable[[TrackedRun], _Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
