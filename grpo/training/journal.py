"""Records the metrics of a run, shows its progress, and collects alarms of the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo.metrics.diagnosis import Diagnosis, Finding
from grpo.run import ranks
from grpo.run.display import Display


@dataclass(kw_only=True)
class Journal:
    """Records rows of metrics and collects the alarms that they raise.

    Attributes:
        record_row: Writes a row to metrics.jsonl and to the trackers.
        display: Shows progress.
        alarm_rules: The config key `logging.alarms`: the rules of the diagnosis whose findings are
            alarms, and the action for each, `snapshot` or `stop`.
        watch: Evaluates the rules of the diagnosis.
        latest_metrics: The numbers of the last row. Every checkpoint contains them, so that
            `checkpoint.keep_best` can compare checkpoints.
    """

    record_row: Callable[[dict[str, Any]], None]
    display: Display
    alarm_rules: Mapping[str, str] = field(default_factory=dict)
    watch: Diagnosis = field(default_factory=Diagnosis)
    latest_metrics: dict[str, Any] = field(default_factory=dict)
    _alarms: list[Finding] = field(default_factory=list)

    def record(self, row: dict[str, Any]) -> None:
        """Records and shows a row of metrics and its findings. All ranks use the row of rank 0."""
        # Measured times differ between ranks. Alarms must be the same on all of them.
        row = ranks.all_gather("the row of metrics", row)[0]
        self.latest_metrics = {
            key: value for key, value in row.items() if isinstance(value, (int, float))
        }
        self.record_row(row)
        if "reward/mean" in row:
            self.display.row(row)
        for finding in self.watch.add_row(row):
            self.display.say(f"diagnosis, {finding.rule}: {finding.text}")
            if finding.rule in self.alarm_rules:
                self._alarms.append(finding)

    def take_alarms(self) -> list[Finding]:
        """Returns the alarms since the last call."""
        alarms = self._alarms
        self._alarms = []
        return alarms
