"""docs/notebook.ipynb runs from the first to the last cell, in a real kernel."""

from pathlib import Path

import pytest
from whole_runs import process_environment

import grpo
from grpo.run.quiet import QUIET_ENVIRONMENT

nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are not installed")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def kernel_environment():
    """Returns the environment of a notebook's kernel: without the variables of these tests."""
    environment = process_environment()
    for name in (*QUIET_ENVIRONMENT, "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    return environment


def output_types(cell):
    """Returns the media types that a cell shows, for example {"text/plain", "image/png"}."""
    types = set()
    for output in cell.outputs:
        types |= set(output.get("data", {}))
    return types


def printed(cell, stream):
    """Returns what a cell has written to "stdout" or "stderr"."""
    texts = [output.text for output in cell.outputs if output.get("name") == stream]
    return "".join(texts)


def test_the_notebook_is_valid_and_has_no_outputs():
    """Outputs would be large, and differ after each execution."""
    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.engine
def test_every_cell_runs_the_accuracy_rises_and_the_plots_exist(tmp_path):
    notebook = read_notebook()
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,  # per cell
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=kernel_environment())
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    for cell in cells.values():
        assert printed(cell, "stderr") == "", cell.source

    run = grpo.Run(tmp_path / "runs" / "notebook" / "grpo")
    accuracies = [row["eval/accuracy"] for row in run.metrics if "eval/accuracy" in row]
    assert 0.3 < accuracies[0] < 0.65
    assert accuracies[-1] > accuracies[0] + 0.2
    for name in ("loss", "accuracy"):
        assert "image/png" in output_types(cells[name])
    assert printed(cells["train"], "stdout").startswith("after 0 rollouts: accuracy ")
    assert len(printed(cells["brevity"], "stdout").splitlines()) == 2 + 4
    assert "752" in printed(cells["ask"], "stdout")  # 485 + 267
