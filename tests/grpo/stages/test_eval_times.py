"""The durations of an evaluation's chunks are summed over all processes of a run."""

import pytest

from grpo.stages.eval_times import ChunkTimes, cost_metrics


def test_a_later_process_adds_its_chunks_to_those_on_disk(tmp_path):
    file = tmp_path / "times.json"
    first = ChunkTimes(file)
    first.record("aime", 0, {"sampling": 10.0, "scoring": 1.0})
    first.record("amc", 0, {"sampling": 99.0, "scoring": 9.0})
    assert first.total("aime", 2) is None  # the second chunk is missing

    second = ChunkTimes(file)
    second.record("aime", 1, {"sampling": 5.0, "scoring": 0.5})
    assert second.total("aime", 2) == {"sampling": 15.0, "scoring": 1.5}
    # The process was killed before it wrote the completions: the chunk is sampled again.
    ChunkTimes(file).record("aime", 1, {"sampling": 7.0, "scoring": 0.5})
    assert ChunkTimes(file).total("aime", 2) == {"sampling": 17.0, "scoring": 1.5}


def test_an_evaluation_of_an_older_version_has_no_durations(tmp_path):
    assert ChunkTimes(tmp_path / "times.json").total("aime", 1) is None


def test_the_cost_is_that_of_sampling_and_scoring():
    times = {"sampling": 1500.0, "scoring": 300.0}
    assert cost_metrics(30_000, times, None) == {
        "time/sampling_s": 1500.0,
        "time/scoring_s": 300.0,
        "tokens_per_s": 20.0,
    }
    # Half an hour at 2.50 per hour.
    assert cost_metrics(30_000, times, 2.5)["cost"] == pytest.approx(1.25)
