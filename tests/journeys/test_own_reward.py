"""docs/extending.md: its examples run as printed, and its tables name every field of the values."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.cli import main
from grpo.types import Completion, Group, Problem

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Returns the working directory, with the page's code in the files that the page names."""
    is_test = "from my_rewards import"
    rewards = [block for block in PYTHON_BLOCKS if is_test not in block and "def load" not in block]
    (data,) = [block for block in PYTHON_BLOCKS if "def load" in block]
    (tests,) = [block for block in PYTHON_BLOCKS if is_test in block]
    assert len(rewards) == 3
    (tmp_path / "my_rewards.py").write_text("\n\n".join(rewards))
    (tmp_path / "my_data.py").write_text(data)
    (tmp_path / "test_my_rewards.py").write_text(tests)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_rewards", "my_data"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("value", [Completion, Problem, Group])
def test_the_tables_name_every_field(value):
    table = PAGE[PAGE.index(f"| `{value.__name__}` | type |") :].partition("\n\n")[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[1:]
    assert sorted(documented) == sorted(field.name for field in dataclasses.fields(value))


def test_the_tests_of_the_page_pass(directory):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_rewards.py"]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    assert "2 passed" in result.stdout


def test_a_config_with_the_rewards_and_the_data_of_the_page_is_accepted(directory, tiny, capsys):
    arguments = [
        "train",
        "--dry-run",
        str(Path(__file__).parents[2] / "configs" / "tiny.yaml"),
        f"model={{path: {tiny()}}}",
        "data={name: my_data:load, options: {maximum: 50}}",
        "prompt.max_tokens=32",
        'rewards={"my_rewards:brevity": {weight: 0.2, options: {max_tokens: 100}}, '
        f'"{directory}/my_rewards.py:exact_match": 1.0, "my_rewards:longest": 0.1}}',
    ]
    assert main(arguments) == 0
    assert "What is 0 + 1?" in capsys.readouterr().out


def test_a_mistake_in_a_name_is_an_error_of_the_dry_run(directory, tiny, capsys):
    config = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
    arguments = ["train", "--dry-run", config, f"model={{path: {tiny()}}}"]
    assert main([*arguments, 'rewards={"my_rewards:brevety": 1.0}']) == 2
    assert "my_rewards.py has no function 'brevety'" in capsys.readouterr().err
