"""Runs docs/first_hour.md in a fresh clone: its commands in order, with the numbers that it states.

Part of `launch/test.sh --all`. Commands that need a GPU are only checked.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from whole_runs import RANK_VARIABLES

from grpo import json_lines
from grpo.metrics.cpu import bfloat16_warning

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first_hour.md").read_text()
CODE_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def clone_repository(target):
    """Clones the last commit and links the virtual environment of this checkout.

    The environment must fit the commit, so these files must not have uncommitted changes.
    """
    files = ["pyproject.toml", "launch"]
    subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", *files], check=True)
    # With an outdated environment, setup.sh in the clone would install the clone into it.
    subprocess.run([str(ROOT / "launch" / "setup.sh")], check=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    (target / ".venv").symlink_to(ROOT / ".venv")


def clone_environment(clone):
    """Returns the environment variables with which commands import the code of the clone."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    variables["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    variables["PYTHONPATH"] = str(clone)
    return variables


def write_files(clone):
    """Writes the code blocks that begin with the name of a file, and returns the names."""
    names = []
    for language, block in CODE_BLOCKS:
        if language in ("python", "yaml"):
            first_line = block.partition("\n")[0]
            name = first_line.removeprefix("# ").strip()
            assert re.fullmatch(r"\w+\.(py|yaml)", name), first_line
            (clone / name).write_text(block)
            names.append(name)
    return names


def commands():
    """Returns the commands of the page as words.

    Those that need a GPU get --dry-run, the others the dtype that the page advises for this CPU.
    """
    assert "./launch/quickstart.sh" in PAGE
    commands = [["./launch/quickstart.sh"]]
    for language, block in CODE_BLOCKS:
        if not language:
            commands += [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    for words in commands:
        if any("gsm8k_qwen" in word for word in words):
            words.append("--dry-run")
        elif words[1:2] in (["train"], ["sft"], ["doctor"]) and bfloat16_warning():
            words.append("model.dtype=float32")
    return commands


def stated_percentages(step):
    """Returns the percentages after "Check:" in a step of the page."""
    text = PAGE[PAGE.index(step) :]
    check = text[text.index("**Check:**") :].partition("\n\n")[0]
    return [float(number) for number in re.findall(r"(\d+\.\d)(?: %| to)", check)]


def held_out_accuracies(run_dir):
    """Returns the first and the last held-out accuracy of a run in percent."""
    rows = json_lines.read_objects(run_dir / "metrics.jsonl")
    accuracies = [100 * row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return [accuracies[0], accuracies[-1]]


def test_every_command_of_the_first_hour_works_and_gives_its_numbers(tmp_path):
    """Slurm commands are skipped; tests/test_launch.py covers them.

    On another kind of CPU the sums of a matrix product are rounded differently, and so are the
    numbers: they may differ by 5 points in the quickstart and by 15 points in the small data set.
    """
    clone = tmp_path / "grpo"
    clone_repository(clone)
    assert write_files(clone) == ["my_rewards.py", "make_problems.py", "my_sft.yaml", "my.yaml"]
    environment = clone_environment(clone)
    for words in commands():
        if words[0] == "sbatch":
            continue
        process = subprocess.run(
            words, cwd=clone, env=environment, capture_output=True, text=True, timeout=3600
        )
        print(words, process.stdout[-2000:], sep="\n")
        assert process.returncode == 0, (words, process.stderr[-3000:])
        if "--ask" in words:
            assert "752" in process.stdout  # 485 + 267: the model has learned to add
    runs = clone / "runs"
    brief = stated_percentages("## Minutes 7 to")
    assert held_out_accuracies(runs / "brief") == pytest.approx(brief, abs=5)
    mine = stated_percentages("## Minutes 12 to")
    assert held_out_accuracies(runs / "mine") == pytest.approx(mine, abs=15)
    assert (runs / "quickstart" / "grpo" / "report.html").exists()
