"""A run directory that an earlier version left half way: this version continues it.

An archive in earlier_runs/ bears the name of the commit that made it. It holds:

    config.yaml
    model/         16,000 random weights
    run/           ends after 2 of 4 rollouts
    metrics.jsonl  of an uninterrupted run of all 4
"""

import json
import tarfile
from pathlib import Path

import pytest
from whole_runs import rows, run

EARLIER_RUNS = sorted((Path(__file__).parent / "earlier_runs").glob("*.tar.xz"))
COMPARED = {
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


def test_there_is_a_run_of_an_earlier_version():
    assert EARLIER_RUNS


@pytest.mark.engine
@pytest.mark.parametrize("archive", EARLIER_RUNS, ids=lambda path: path.name)
def test_a_run_of_an_earlier_version_continues_as_that_version_did(tmp_path, archive, monkeypatch):
    """Not to the bit: kernels, and with them the last bits, differ between kinds of CPU."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    run("config.yaml", "--resume")
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    continued = rows(tmp_path / "run")
    assert [row["rollout"] for row in continued] == [0, 1, 2, 3, 4]
    for row, other in zip(continued, expected, strict=True):
        same = {name: value for name, value in other.items() if name in COMPARED}
        assert {name: row[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-5)
    assert {"reward/mean", "loss", "policy/grad_norm", "kl/ref"} <= COMPARED & expected[-1].keys()
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
