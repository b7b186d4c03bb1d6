"""The durations of an evaluation's chunks, in times.json of its run directory.

They are on disk so that a resumed evaluation reports the sum over all chunks, including those of
earlier processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from grpo.run.directory import write_file

Times = dict[str, float]  # seconds by phase: {"sampling": 12.5, "scoring": 0.8}


class ChunkTimes:
    """The durations of the chunks of all sets of a run."""

    def __init__(self, file: Path) -> None:
        """`file`: a JSON file. It is created by the first `record`."""
        self._file = file

    def record(self, set_name: str, chunk: int, times: Times) -> None:
        """Writes the durations of a chunk.

        Call it before the chunk's completions are written. A chunk that is sampled again then
        replaces its durations, and no chunk on disk lacks them.
        """
        all_times = self._read()
        all_times.setdefault(set_name, {})[str(chunk)] = times
        write_file(self._file, json.dumps(all_times, indent=2) + "\n")

    def total(self, set_name: str, num_chunks: int) -> Times | None:
        """Returns the durations of a set: `{"sampling": 112.5, "scoring": 7.8}`.

        None if a chunk has none, because an older version of grpo has sampled it.
        """
        times_by_chunk = self._read().get(set_name, {})
        if len(times_by_chunk) < num_chunks:
            return None
        total: Times = {}
        for times in times_by_chunk.values():
            for phase, seconds in times.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

    def _read(self) -> dict[str, dict[str, Times]]:
        if not self._file.exists():
            return {}
        times: dict[str, dict[str, Times]] = json.loads(self._file.read_text())
        return times


def cost_metrics(num_tokens: int, times: Mapping[str, float], price: float | None) -> Times:
    """Returns the durations of a set, its sampling rate and, with a price, its cost.

    Args:
        num_tokens: Number of sampled tokens.
        times: The durations of its chunks, from `ChunkTimes.total`.
        price: Price of the machine per hour.
    """
    metrics = {
        "time/sampling_s": times["sampling"],
        "time/scoring_s": times["scoring"],
        "tokens_per_s": num_tokens / max(times["sampling"], 1e-9),
    }
    if price is not None:
        metrics["cost"] = price * (times["sampling"] + times["scoring"]) / 3600
    return metrics
