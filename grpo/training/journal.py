"""Records a run's metrics, shows its progress, and reports the findings of the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo.metrics.diagnosis import Finding, Watch
from grpo.run import ranks
from grpo.run.display import Display


@dataclass(kw_only=True)
class Journal:
    """Records a run's rows of metrics and collects the alarms that they raise.

    `alarm_rules` are the rules of the diagnosis whose findings are alarms, with what is done then
    (`logging.alarms`). `latest` is the last row's numbers, by which a checkpoint is judged.
    """

    record_row: Callable[[dict[str, Any]], None]  # writes metrics.jsonl and the trackers
    display: Display
    alarm_rules: Mapping[str, str] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    latest: dict[str, Any] = field(default_factory=dict)
    _alarms: list[Finding] = field(default_factory=list)

    def record(self, row: dict[str, Any]) -> None:
        """Writes and shows rank 0's row of metrics, and what the diagnosis says of it."""
        # Times differ between ranks; what is decided by them must not.
        row = ranks.all_gather("the other ranks' row", row)[0]
        self.latest = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self.record_row(row)
        if "reward/mean" in row:
            self.display.row(row)
        for finding in self.watch.see(row):
            self.display.say(f"diagnosis, {finding.rule}: {finding.text}")
            if finding.rule in self.alarm_rules:
                self._alarms.append(finding)

    def take_alarms(self) -> list[Finding]:
        """Returns the alarms since the last call."""
        alarms = self._alarms
        self._alarms = []
        return alarms
