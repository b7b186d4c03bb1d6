"""Runs the commands of docs/first_hour.md in order, in a fresh clone (`launch/test.sh --all`)."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from whole_runs import RANK_VARIABLES

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first_hour.md").read_text()
# Arguments that are appended to a command which contains the key. A command that needs a GPU is
# only checked, and a long training run has one rollout.
EXTRA_ARGUMENTS = {
    "gsm8k_qwen": ["--dry-run"],
    "run_dir=runs/mine": ["train.rollouts=1", "eval.problems=4"],
}


def clone_repository(target):
    """Clones the last commit and links the virtual environment of this checkout.

    The environment must fit the commit, so these files must not have uncommitted changes.
    """
    files = ["pyproject.toml", "launch"]
    subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", *files], check=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    (target / ".venv").symlink_to(ROOT / ".venv")


def clone_environment(clone):
    """Returns the environment variables with which commands import the code of the clone."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    variables["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    variables["PYTHONPATH"] = str(clone)
    return variables


def write_problems(path):
    lines = []
    for a in range(10, 60):
        problem = {"problem": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)}
        lines.append(json.dumps(problem) + "\n")
    path.write_text("".join(lines))


def extract_commands(clone):
    """Returns the commands of the page. Writes its Python code to my_rewards.py."""
    assert "./launch/quickstart.sh" in PAGE
    commands = ["./launch/quickstart.sh"]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for language, block in blocks:
        if language == "python":
            (clone / "my_rewards.py").write_text(block)
        else:
            commands += block.replace("\\\n", "").splitlines()
    return commands


def extra_arguments(command):
    for key, arguments in EXTRA_ARGUMENTS.items():
        if key in command:
            return arguments
    return []


def test_every_command_of_the_first_hour_works(tmp_path):
    """Slurm commands are skipped; tests/test_launch.py covers them."""
    clone = tmp_path / "grpo"
    clone_repository(clone)
    write_problems(clone / "my.jsonl")
    environment = clone_environment(clone)
    for command in extract_commands(clone):
        words = shlex.split(command)
        if words[0] == "sbatch":
            continue
        words += extra_arguments(command)
        process = subprocess.run(
            words, cwd=clone, env=environment, capture_output=True, text=True, timeout=1500
        )
        print(command, process.stdout[-2000:], sep="\n")
        assert process.returncode == 0, (command, process.stderr[-3000:])
        if "--ask" in words:
            assert "752" in process.stdout  # 485 + 267: the model has learned to add
    assert "my_rewards:brevity" in (clone / "runs/brief/metrics.jsonl").read_text()
    assert (clone / "runs/quickstart/grpo/report.html").exists()
    assert (clone / "runs/mine/final/model.safetensors").exists()
