"""launch/smoke_8gpu.sh on a machine without GPUs."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "launch" / "smoke_8gpu.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with GPUs takes all of them")
def test_smoke_script_prints_a_table_and_a_broken_run_fails_it(tmp_path):
    environment = os.environ | {"RUNS": str(tmp_path / "smoke")}
    process = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    for row in ("ranks  resumed                   after rollout 2", "pool   rollouts"):
        assert row in process.stdout
    assert "FAILED" not in process.stdout

    # The table fails without the records of the last rollout.
    metrics = tmp_path / "smoke" / "ranks" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    python = SCRIPT.parents[1] / ".venv" / "bin" / "python"
    command = [python, SCRIPT.with_name("smoke.py"), tmp_path / "smoke"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert "FAILED" in process.stdout
    assert "rollouts: 3, expected 4" in process.stdout
