"""The trackers receive numbers, histograms and completions. A tracker that fails stops no run."""

import json
import struct
import sys
import types

import pytest
from stage_configs import eval_config

from grpo import config as configs
from grpo.config import EvalConfig
from grpo.run.trackers import MAX_FAILURES, MAX_TEXT_CHARS, TrackedRun, Trackers
from grpo.stages.run_context import open_stage
from grpo.types import UserError

# Two completions of 1 token, three of 4 to 7, and one of 8 to 15.
LENGTHS = [2, 0, 3, 1]
# One sample with an advantage of -0.5, and two of 4.
ADVANTAGES = [0] * 7 + [1] + [0] * 8 + [2]
ROW = {
    "step": 3,
    "reward/mean": 0.25,
    "histogram/length": LENGTHS,
    "histogram/advantage": ADVANTAGES,
    "histogram/staleness": [0, 5],
    "note": "text",
}
SAMPLE = {
    "problem": "gsm8k/7",
    "question": "2+2?",
    "completion": "<think>4</think> <answer>4</answer>",
    "reward": 1.1,
    "verdict": "correct",
}
HOSTILE = "a\x00b\x1b[31mc\x85d\ud800e\u2028f | g </pre><script>\r\n# h\n" + "x" * 100_000 + "END"
HOSTILE_SAMPLE = {**SAMPLE, "completion": HOSTILE, "reward": None, "verdict": None}


def tracked_run(run_dir, **changes):
    fields = {"project": "grpo", "run_dir": run_dir, "run_id": "id", "config": {"seed": 0}}
    return TrackedRun(**{**fields, **changes})


def read_tensorboard(run_dir):
    """Returns everything in the event files of a run."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def texts(events):
    """Returns the table of completions by step."""
    return {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("samples/text_summary")
    }


def test_tensorboard_stores_every_number_at_its_step(tmp_path):
    with Trackers(["tensorboard"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW)
        trackers.log(ROW | {"step": 4, "reward/mean": 0.75})
    events = read_tensorboard(tmp_path)
    points = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert points == [(3, 0.25), (4, 0.75)]
    assert "note" not in events.Tags()["scalars"]
    assert "histogram/length" not in events.Tags()["scalars"]


def test_tensorboard_stores_the_bins_of_the_histograms(tmp_path):
    with Trackers(["tensorboard"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW)
        trackers.log({"step": 4, "histogram/length": [0, 0], "histogram/advantage": []})
    events = read_tensorboard(tmp_path)
    (lengths,) = events.Histograms("histogram/length")
    assert lengths.step == 3
    value = lengths.histogram_value
    assert list(value.bucket) == LENGTHS
    assert list(value.bucket_limit) == [2, 4, 8, 16]
    assert (value.min, value.max, value.num) == (1, 16, 6)
    assert value.sum == 2 * 1.5 + 3 * 6 + 12
    assert value.sum_squares == 2 * 1.5**2 + 3 * 6**2 + 12**2
    (advantages,) = events.Histograms("histogram/advantage")
    value = advantages.histogram_value
    assert (value.min, value.max) == (-0.75, 4.25)
    assert value.sum == -0.5 + 2 * 4
    (staleness,) = events.Histograms("histogram/staleness")
    assert list(staleness.histogram_value.bucket_limit) == [0.5, 1.5]


def test_tensorboard_stores_completions_as_literal_text(tmp_path):
    with Trackers(["tensorboard"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW, [SAMPLE, HOSTILE_SAMPLE])
        trackers.log(ROW | {"step": 4})  # a step without completions
    by_step = texts(read_tensorboard(tmp_path))
    assert list(by_step) == [3]
    first, second = by_step[3].split("\n\n---\n\n")
    assert first == (
        "    gsm8k/7: reward 1.1, correct\n\n    2+2?\n    \n"
        "    <think>4</think> <answer>4</answer>"
    )
    assert second.startswith("    gsm8k/7: reward none, no verdict\n\n    2+2?\n")
    # Markdown shows indented lines as they are, so no line of the completion is markup.
    assert all(line.startswith("    ") or not line for line in second.split("\n"))
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde" in second
    assert second.endswith("xxEND")
    assert len(second) < MAX_TEXT_CHARS + 200


class OtherHistogram:
    def __init__(self, np_histogram):
        self.counts, self.edges = np_histogram


def other_library(log, **attributes):
    """Returns a module with the interface of trackio."""
    library = types.ModuleType("trackio")
    library.init = lambda **_: None
    library.log = log
    library.finish = lambda: None
    for name, value in attributes.items():
        setattr(library, name, value)
    return library


def test_a_tracker_that_fails_is_reported_and_dropped_and_the_others_continue(
    tmp_path, monkeypatch
):
    calls = []

    def log(values):
        calls.append(values)
        if len(calls) != 2:
            raise ConnectionError("the server\nis down")

    monkeypatch.setitem(sys.modules, "trackio", other_library(log, Histogram=OtherHistogram))
    messages = []
    run = tracked_run(tmp_path, num_samples=2)
    with Trackers(["trackio", "tensorboard"], run, messages.append) as trackers:
        for step in range(8):
            trackers.log(ROW | {"step": step})
        assert trackers.num_samples == 2
    # One failure, a success, then the failures that drop it.
    assert len(calls) == 2 + MAX_FAILURES
    assert calls[0]["histogram/length"].edges == [1, 2, 4, 8, 16]
    assert messages[0] == (
        "logging.trackers: trackio failed in step 0: ConnectionError: the server"
    )
    assert len(messages) == 1 + MAX_FAILURES
    assert messages[-1].endswith("It receives nothing more; metrics.jsonl has all steps")
    assert len(read_tensorboard(tmp_path).Scalars("reward/mean")) == 8


def test_a_tracker_that_cannot_be_closed_is_reported(tmp_path, monkeypatch):
    def finish():
        raise TimeoutError("no answer")

    library = other_library(lambda values: None, finish=finish)
    monkeypatch.setitem(sys.modules, "trackio", library)
    messages = []
    with Trackers(["trackio"], tracked_run(tmp_path), messages.append):
        pass
    assert messages == ["logging.trackers: trackio cannot be closed: TimeoutError: no answer"]


def test_an_inner_run_has_the_trackers_for_itself(tmp_path, monkeypatch):
    """trackio and W&B have one open run per process."""
    open_runs = []
    rows = []
    library = other_library(lambda values: rows.append((open_runs[-1], values["x"])))
    library.init = lambda name, **_: open_runs.append(name.partition("-")[0])
    library.finish = open_runs.pop
    monkeypatch.setitem(sys.modules, "trackio", library)
    outer, inner = (tracked_run(tmp_path / name) for name in ("outer", "inner"))
    with Trackers(["trackio"], outer) as trackers:
        with trackers.suspended():
            assert open_runs == []
            with Trackers(["trackio"], inner) as inner_trackers:
                inner_trackers.log({"step": 1, "x": 1})
        trackers.log({"step": 1, "x": 2})
    assert rows == [("inner", 1), ("outer", 2)]
    assert open_runs == []


def test_the_first_tracker_is_closed_if_the_second_cannot_be_opened(tmp_path, monkeypatch):
    num_finished = []
    library = other_library(None, finish=lambda: num_finished.append(1))
    monkeypatch.setitem(sys.modules, "trackio", library)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        Trackers(["trackio", "wandb"], tracked_run(tmp_path))
    assert num_finished == [1]


def test_a_failing_tracker_is_reported_although_the_progress_is_off(tmp_path, monkeypatch, capsys):
    def log(values):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "trackio", other_library(log))
    config = configs.load(
        eval_config(tmp_path, "m"), ["logging={trackers: [trackio], progress: off}"], EvalConfig
    )
    with open_stage(config, "eval", total=1, unit="step", resume=False) as context:
        context.display.say("no line")
        context.record({"step": 1, "reward/mean": 0.5})
    message = "logging.trackers: trackio failed in step 1: ConnectionError: no network\n"
    assert capsys.readouterr() == ("", message)


def test_a_tracker_that_cannot_be_opened_stops_a_new_run_but_not_a_resumed_one(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "tensorboard").write_text("a file in place of the folder")
    with pytest.raises(UserError, match=r"tensorboard cannot be opened: .*, or remove tensorboard"):
        Trackers(["tensorboard"], tracked_run(tmp_path))
    messages = []
    run = tracked_run(tmp_path, is_resumed=True, num_samples=4)
    with Trackers(["tensorboard"], run, messages.append) as trackers:
        trackers.log(ROW)
        assert trackers.num_samples == 0
    (message,) = messages
    assert message.endswith("The run continues without it")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_error_of_a_tracker_that_is_not_installed_names_the_package(
    name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        Trackers([name], tracked_run(tmp_path))


def test_a_stage_sends_the_first_completions_of_each_step(tmp_path):
    config = configs.load(
        eval_config(tmp_path, "m"),
        ["logging={trackers: [tensorboard], tracked_samples: 2, progress: off}"],
        EvalConfig,
    )
    with open_stage(config, "eval", total=1, unit="step", resume=False) as context:
        for step in (1, 2):
            rows = [{**SAMPLE, "problem": f"step{step}/{index}"} for index in range(5)]
            context.run.write_samples(f"step-{step:06d}", rows)
            context.record({"step": step, "reward/mean": 0.5})
        context.run.write_samples("chunk-000003", [SAMPLE])
        context.record({"step": 3})
        context.record({"step": 4})  # no completions
    by_step = texts(read_tensorboard(tmp_path / "run"))
    assert list(by_step) == [1, 2, 3]
    assert "step2/0" in by_step[2]
    assert "step2/1" in by_step[2]
    assert "step2/2" not in by_step[2]


def wandb_records(file):
    """Yields the records of an offline run: a log in LevelDB's format with a header of 7 bytes."""
    data = file.read_bytes()
    block_size = 32_768
    position = 7
    record = b""
    while position + 7 <= len(data):
        space = block_size - position % block_size
        if space < 7:
            position += space
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield record
            record = b""


def test_wandb_stores_numbers_histograms_and_a_table_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Trackers(["wandb"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW, [SAMPLE, HOSTILE_SAMPLE])
    assert wandb.run is None  # finished
    history = {}
    for data in wandb_records(next(tmp_path.rglob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            history[tuple(item.nested_key)] = json.loads(item.value_json)
    assert history["reward/mean",] == 0.25
    assert history["_step",] == 3
    assert history["histogram/length", "values"] == LENGTHS
    assert history["histogram/length", "bins"] == [1, 2, 4, 8, 16]
    assert history["samples", "nrows"] == 2
    table = json.loads(next(tmp_path.rglob("*.table.json")).read_text())
    assert table["columns"] == ["problem", "question", "completion", "reward", "verdict"]
    assert table["data"][0] == list(SAMPLE.values())
    assert table["data"][1][2].startswith("a\ufffdb\ufffd[31mc")


def test_trackio_stores_numbers_histograms_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    with Trackers(["trackio"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW, [SAMPLE, HOSTILE_SAMPLE])
    (log,) = SQLiteStorage.get_logs("grpo", f"{tmp_path.name}-id")
    assert log["reward/mean"] == 0.25
    assert log["histogram/length"]["values"] == LENGTHS
    assert log["histogram/length"]["bins"] == [1, 2, 4, 8, 16]
    rows = log["samples"]["_value"]
    assert [row["problem"] for row in rows] == ["gsm8k/7", "gsm8k/7"]
    assert rows[1]["completion"].startswith("a\ufffdb\ufffd[31mc")
