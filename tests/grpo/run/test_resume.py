"""Tests that this version continues an interrupted run of an earlier version.

Each archive in earlier_runs/ is named after the commit that wrote it. It contains:

    config.yaml
    model/         16,000 random weights
    run/           the run directory after 2 of 4 rollouts
    metrics.jsonl  the metrics of an uninterrupted run with all 4 rollouts
"""

import json
import tarfile
from pathlib import Path

import pytest
from whole_runs import read_metrics, run_grpo

EARLIER_RUNS = sorted((Path(__file__).parent / "earlier_runs").glob("*.tar.xz"))
# Metrics that are compared, if the earlier version wrote them.
COMPARED_METRICS = {
    "reward/mean",
    "loss",
    "policy/grad_norm",
    "policy/entropy",
    "policy/lr",
    "kl/ref",
    "completion/tokens",
    "eval/digits:share",
    "update",
}


def test_the_run_of_an_earlier_version_exists():
    assert EARLIER_RUNS


@pytest.mark.engine
@pytest.mark.parametrize("archive", EARLIER_RUNS, ids=lambda path: path.name)
def test_a_resumed_run_of_an_earlier_version_has_the_metrics_of_its_uninterrupted_run(
    tmp_path, archive, monkeypatch
):
    """They are equal up to a tolerance, because the kernels' rounding depends on the CPU model."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    run_grpo("config.yaml", "--resume")
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    actual = read_metrics(tmp_path / "run")
    assert [row["rollout"] for row in actual] == [0, 1, 2, 3, 4]
    for row, expected_row in zip(actual, expected, strict=True):
        keys = COMPARED_METRICS & expected_row.keys()
        expected_values = {key: expected_row[key] for key in keys}
        actual_values = {key: row[key] for key in keys}
        assert actual_values == pytest.approx(expected_values, rel=1e-3, abs=1e-5)
    compared_keys = COMPARED_METRICS & expected[-1].keys()
    assert compared_keys >= {"reward/mean", "loss", "policy/grad_norm", "kl/ref"}
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
