"""Models of the hub: downloads with progress, gated and missing models, a cache without network.

A local server speaks the hub's protocol. huggingface_hub reads its address when it is imported, so
every test runs `grpo` in a process of its own.
"""

import os
import shutil
import subprocess
import sys

import pytest
from hub_server import serve_hub
from whole_runs import RANK_VARIABLES


@pytest.fixture(scope="module")
def hub(tiny):
    with serve_hub(tiny()) as url:
        yield url


def run_doctor(model, hf_home, **variables):
    """Runs `grpo doctor` on a model and returns the process."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "0", **variables}
    command = [sys.executable, "-m", "grpo", "doctor", "configs/tiny.yaml", "--no-sample"]
    return subprocess.run(
        [*command, f"model={{path: {model}}}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_model_is_downloaded_with_progress_and_then_found_without_network(hub, tmp_path):
    process = run_doctor("owner/tiny", tmp_path, HF_ENDPOINT=hub)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "downloading owner/tiny, 0." in process.stderr
    offline = run_doctor("owner/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stdout + offline.stderr
    assert "downloading" not in offline.stderr
    shutil.rmtree(tmp_path / "hub")
    missing = run_doctor("owner/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert missing.returncode == 2
    assert "the hub cannot be reached, and there is no cached copy" in missing.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("owner/gated", "Accept its terms at https://huggingface.co/owner/gated"),
        ("owner/gated", "run `hf auth login` or set HF_TOKEN"),
        ("owner/none", "the hub has no model of this name, or it is private"),
    ],
)
def test_a_model_without_access_is_an_error_with_the_way_to_it(hub, tmp_path, model, message):
    process = run_doctor(model, tmp_path, HF_ENDPOINT=hub)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert message in line
