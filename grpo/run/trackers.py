"""Sends a run's metrics to TensorBoard, W&B and trackio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.types import UserError


class Trackers:
    """TensorBoard, W&B and trackio, when asked for.

    Raises UserError for one that is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        project: str,
        run_dir: Path,
        run_id: str,
        resolved: dict[str, Any],
    ) -> None:
        """Opens the trackers of these names, which show the run under `project`.

        `run_id` is the run's own for life: a resumed run goes on in the same place, and no two runs
        share one.
        """
        self._sinks: list[Any] = []
        for name in names:
            try:
                self._sinks.append(_open_tracker(name, project, run_dir, run_id, resolved))
            except ImportError as error:
                raise UserError(
                    f"logging.trackers: {name} is not installed ({error}): pip install {name}"
                ) from None

    def log(self, row: dict[str, Any]) -> None:
        """Sends the numbers of a row of metrics to every tracker."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for write, _ in self._sinks:
            write(numbers, int(row["step"]))

    def __enter__(self) -> Trackers:
        """Returns the trackers; the end of the `with` block closes them."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes every tracker."""
        for _write, close in self._sinks:
            close()


def _open_tracker(
    name: str, project: str, run_dir: Path, run_id: str, resolved: dict[str, Any]
) -> Any:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"))

        def write(row: dict[str, float], step: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    if name == "wandb":
        import wandb

        run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            config=resolved,
            resume="allow",
            id=run_id,
        )
        return lambda row, step: run.log(row, step=step), run.finish
    import trackio

    trackio.init(project=project, name=f"{run_dir.name}-{run_id}", config=resolved, resume="allow")
    return lambda row, step: trackio.log(row), trackio.finish
