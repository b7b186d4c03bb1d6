"""docs/python.md: its examples run in their order, in one process."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import grpo
from grpo.metrics.cpu import bfloat16_warning

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Returns the working directory, with the configs of the repository.

    Those of the tiny model have the dtype that is fast on this CPU.
    """
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    if bfloat16_warning():
        for path in (tmp_path / "configs").glob("tiny*.yaml"):
            path.write_text(path.read_text().replace("dtype: bfloat16", "dtype: float32"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.slow
@pytest.mark.engine
def test_all_examples_run_as_printed(directory, capsys):
    names = {}
    for block in BLOCKS:
        exec(block, names)
    output = capsys.readouterr().out
    shown = re.search(r"# (Run\('runs/tiny_sft': sft, finished, step 20, loss) \d", PAGE)
    assert output.startswith(shown.group(1))
    assert "stopped: StopRun\nfinished\n" in output
    assert "runs/stopped/final\n" in output
    assert "configs/tiny.yaml: train.rollout: unknown key (did you mean rollouts?). " in output
    assert names["run"].status == "finished"
    assert names["evaluation"].table["all"]["accuracy"] >= 0
    assert [len(completions) for completions in names["answers"]] == [4, 4]


def test_the_page_names_every_public_name():
    for name in grpo.__all__:
        assert f"grpo.{name}" in PAGE or name in ("Completion", "Model"), name


def test_the_table_of_results_names_every_property_of_a_run():
    table = PAGE[PAGE.index("## Results") : PAGE.index("## Train and ask")]
    for name in vars(grpo.Run):
        if not name.startswith("_"):
            assert f"`{name}" in table, name
