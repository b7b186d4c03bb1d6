"""docs/first_hour.md as a reader goes through it: its commands in their order, in a fresh clone.

`launch/test.sh --all`.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from whole_runs import OF_RANKS

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SHORTER = {
    "gsm8k_qwen": ["--dry-run"],
    "run_dir=runs/mine": ["train.rollouts=1", "eval.problems=4"],
}
PAGE = (ROOT / "docs" / "first_hour.md").read_text()


def test_every_command_of_the_first_hour_does_what_the_page_says(tmp_path):
    """What needs a GPU is only checked (`--dry-run`), what is long is cut to a rollout, Slurm is
    tests/test_launch.py's.
    """
    # .venv is of these
    subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "pyproject.toml", "launch"],
        check=True,
    )
    here = tmp_path / "grpo"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(here)], check=True)
    (here / ".venv").symlink_to(ROOT / ".venv")
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    # the clone's code, not ours
    environment |= {
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(here),
    }
    problems = [
        {"problem": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(10, 60)
    ]
    (here / "my.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert "./launch/quickstart.sh" in PAGE
    commands = ["./launch/quickstart.sh"]
    for language, block in blocks:
        if language == "python":
            (here / "my_rewards.py").write_text(block)
        else:
            commands += block.replace("\\\n", "").splitlines()
    for command in commands:
        words = shlex.split(command)
        if words[0] == "sbatch":
            continue
        words += next((more for part, more in SHORTER.items() if part in command), [])
        done = subprocess.run(
            words, cwd=here, env=environment, capture_output=True, text=True, timeout=1500
        )
        print(command, done.stdout[-2000:], sep="\n")
        assert done.returncode == 0, (command, done.stderr[-3000:])
        if "--ask" in words:
            assert "752" in done.stdout  # 485+267, by a model that has learned to add
    assert "my_rewards:brevity" in (here / "runs/brief/metrics.jsonl").read_text()
    assert (here / "runs/quickstart/grpo/report.html").exists() and (
        here / "runs/mine/final/model.safetensors"
    ).exists()
