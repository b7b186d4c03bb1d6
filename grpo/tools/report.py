"""`grpo report`: writes one HTML file about runs, which needs no network.

It also writes the charts as files for a paper, or follows a live run in the terminal.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from grpo import json_lines
from grpo.metrics.diagnosis import Diagnosis, diagnose
from grpo.run.directory import (
    RunDirectory,
    read_manifest,
    read_metrics,
    write_file,
)
from grpo.tools.charts import charts, series
from grpo.types import UserError

TEMPLATE = Path(__file__).with_name("report.html")
# Size of the sample files whose completions are in the page. A page of this size opens quickly.
MAX_SAMPLE_BYTES = 40_000_000
MAX_DATA_CHARS = 14_000_000  # of the compressed completions; MAX_SAMPLE_BYTES usually take less
MAX_TEXT_CHARS = 40_000  # of one completion
# The page may run its own script and use nothing else: if a text ever escaped its element, it could
# neither run a script nor send anything.
POLICY = (
    "default-src 'none'; script-src '{script_hash}'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
FOLLOWED_METRICS = (
    "loss",
    "reward/mean",
    "reward/accuracy",
    "eval/accuracy",
    "completion/length",
    "policy/entropy",
    "time/total_s",
)
FACT_COLUMNS = (
    "run",
    "stage",
    "status",
    "model",
    "data",
    "recipe",
    "seed",
    "steps",
    "held-out accuracy",
    "commit",
)


def report(runs: Sequence[str], *, output: str | None, plots: str | None) -> None:
    """Writes the page, and every chart as SVG and PNG if `plots` is set.

    Args:
        runs: Run directories. A pipeline stands for all its stages.
        output: Path of the page. Default: report.html in the first run.
        plots: Folder for the chart files.

    Raises:
        UserError: A directory is not a run.
    """
    folders = expand(runs)
    rows = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    figures = charts(rows)
    if plots:
        _write_plots(Path(plots), figures)
    page = Path(output) if output else Path(runs[0]) / "report.html"
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "policy": POLICY.format(script_hash=_script_hash(template)),
        "title": html.escape(", ".join(folders)),
        "facts": _facts(folders, rows, page.parent),
        "findings": _findings(rows),
        "stages": _stages(Path(runs[0])),
        "charts": "\n".join(_figure(title, figure) for title, figure in figures.items()),
        "data": _packed_completions(folders),
    }
    text = re.sub(r"\{\{(?P<name>\w+)\}\}", lambda slot: parts[slot["name"]], template)
    write_file(page, text)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def _script_hash(template: str) -> str:
    """Returns the hash of the page's script, as a Content-Security-Policy names it."""
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _packed_completions(folders: Mapping[str, Path]) -> str:
    """Returns the completions of the runs, fewer of them if they would make the page too large."""
    max_bytes = MAX_SAMPLE_BYTES
    data = pack(completions(folders, max_bytes))
    while len(data) > MAX_DATA_CHARS:
        max_bytes //= 2
        data = pack(completions(folders, max_bytes))
    return data


def _write_plots(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes every chart as SVG and PNG: "Mean reward" as mean_reward.svg and mean_reward.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        name = re.sub("[ /]+", "_", title.lower())
        figure.savefig(folder / f"{name}.svg", dpi=200)
        figure.savefig(folder / f"{name}.png", dpi=200)
    print(f"{len(figures)} charts in {folder}")


def expand(runs: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of the runs by name. A pipeline is replaced by its stages.

    Raises:
        UserError: A directory has no metrics.jsonl, and is not a pipeline with such stages.
    """
    folders: dict[str, Path] = {}
    for run in map(Path, runs):
        stages = [run / name for name in read_manifest(run).get("stages", ())]
        candidates = stages or [run]
        with_metrics = [folder for folder in candidates if (folder / "metrics.jsonl").exists()]
        if not with_metrics:
            raise UserError(f"{run}: not a run directory (no metrics.jsonl)")
        for folder in with_metrics:
            if stages and "-" in folder.name:
                continue  # an evaluation of a pipeline: the table of stages has its result
            name = folder.name if folder.name not in folders else str(folder)
            folders[name] = folder
    return folders


def _figure(title: str, figure: Any) -> str:
    """Returns a chart as an HTML figure with an SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    document = buffer.getvalue()
    svg = document[document.index("<svg") :]
    label = html.escape(title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure><figcaption>{label}</figcaption>{svg}</figure>"


def _facts(
    folders: Mapping[str, Path], rows: Mapping[str, Sequence[Mapping[str, Any]]], page_dir: Path
) -> str:
    """Returns the rows of the table of runs. Links are relative to the folder of the page."""
    lines = [_table_row(FACT_COLUMNS, cell="th")]
    for name, folder in folders.items():
        manifest = read_manifest(folder)
        config_file = folder / "config.yaml"
        config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
        data = config.get("data", {})
        target = html.escape(quote(os.path.relpath(folder, page_dir)))
        facts = [
            manifest.get("stage", ""),
            manifest.get("status", ""),
            config.get("model", {}).get("path", ""),
            data.get("name") or ", ".join(data.get("mixture", {})),
            config.get("algorithm", {}).get("preset", ""),
            manifest.get("seed", ""),
            max([0, *(row["step"] for row in rows[name])]),
            _accuracy_range(rows[name]),
            str(manifest.get("commit") or "")[:10],
        ]
        link = f'<a href="{target}">{html.escape(name)}</a>'
        lines.append(_table_row([link, *(html.escape(str(fact)) for fact in facts)]))
    return "\n".join(lines)


def _accuracy_range(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the first and the last held-out accuracy of a run."""
    accuracies = [value for _, value in series(rows, "eval/accuracy")]
    if not accuracies:
        return ""
    if len(accuracies) == 1:
        return f"{accuracies[0]:.1%}"
    return f"{accuracies[0]:.1%} to {accuracies[-1]:.1%}"


def _table_row(cells: Sequence[str], cell: str = "td") -> str:
    """Returns a table row of cells that are already HTML."""
    return "<tr>" + "".join(f"<{cell}>{content}</{cell}>" for content in cells) + "</tr>"


def _findings(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the findings of all runs as list items."""
    items = []
    for name, rows_of_run in rows.items():
        prefix = f"{name} " if len(rows) > 1 else ""
        for finding in diagnose(rows_of_run):
            heading = html.escape(f"{prefix}step {finding.step}, {finding.rule}")
            items.append(f"<li><b>{heading}</b>: {html.escape(finding.text)}</li>")
    if not items:
        return "<li>Nothing to report: no rule of the diagnosis applies.</li>"
    return "\n".join(items)


def _stages(run: Path) -> str:
    """Returns the result table of a pipeline, and nothing for other runs."""
    table_file = run / "table.json"
    if "stages" not in read_manifest(run) or not table_file.exists():
        return ""
    table: list[dict[str, Any]] = json.loads(table_file.read_text())
    sets: list[str] = []
    for row in table:
        sets += [key for key in row if key != "stage" and key not in sets]
    lines = [_table_row(["stage", *(html.escape(name) for name in sets)], cell="th")]
    for row in table:
        cells = [html.escape(row["stage"])]
        for name in sets:
            accuracy = row.get(name, {}).get("accuracy")
            cells.append("" if accuracy is None else f"{accuracy:.1%}")
        lines.append(_table_row(cells))
    return "<h2>Stages</h2><div class=wide><table>" + "\n".join(lines) + "</table></div>"


def completions(folders: Mapping[str, Path], max_bytes: int = MAX_SAMPLE_BYTES) -> dict[str, Any]:
    """Returns the completions of the runs, as the page expects them.

    Args:
        folders: The folders of the runs by name.
        max_bytes: Size of the sample files whose completions are returned. Of larger ones, every
            n-th file and the last one are read, and of a file that is larger than this, the first
            completions.

    Returns:
        `files`: names of the sample files. `problems`: `[id, question, answer]` of each problem.
        `rows`: one list per completion; report.html names its columns. `note`: a text if the page
        does not contain all completions.
    """
    files: list[tuple[str, Path]] = []
    for name, folder in folders.items():
        files += [(name, file) for file in sorted((folder / "samples").glob("*.jsonl"))]
    total_bytes = sum(file.stat().st_size for _, file in files)
    stride = max(1, math.ceil(total_bytes / max_bytes))
    included = [pair for i, pair in enumerate(files) if i % stride == 0 or i == len(files) - 1]
    problems: dict[str, list[str]] = {}  # by id
    problem_numbers: dict[str, int] = {}  # by id
    rows: list[list[Any]] = []
    num_shortened = 0
    for file_number, (_, file) in enumerate(included):
        samples = json_lines.read_objects(file)
        num_shown = math.ceil(len(samples) * min(1.0, max_bytes / max(1, file.stat().st_size)))
        num_shortened += num_shown < len(samples)
        for sample in samples[:num_shown]:
            problem_id = sample["problem"]
            if problem_id not in problems:
                problem_numbers[problem_id] = len(problems)
                problems[problem_id] = [problem_id, sample["question"], sample["answer"]]
            rows.append([file_number, problem_numbers[problem_id], *_columns(sample, file)])
    note = ""
    if len(included) < len(files) or num_shortened:
        note = f"This page contains {len(included)} of {len(files)} files of samples"
        if num_shortened:
            note += f", and of {num_shortened} of them the first completions"
        note += ". All of them are in samples/."
    names = [file.stem for _, file in included]
    if len(folders) > 1:
        names = [f"{name} {file.stem}" for name, file in included]
    return {"files": names, "problems": list(problems.values()), "rows": rows, "note": note}


def _columns(sample: Mapping[str, Any], file: Path) -> list[Any]:
    """Returns the columns of a completion after its file and its problem."""
    text = sample["completion"]
    if len(text) > MAX_TEXT_CHARS:
        half = MAX_TEXT_CHARS // 2
        text = f"{text[:half]}\n[... complete text in {file} ...]\n{text[-half:]}"
    return [
        text,
        sample["reward"],
        sample["parts"],
        sample.get("verdict") or "",
        sample.get("reason"),
        sample["finish_reason"] == "length",
        sample.get("advantage"),
        sample["tokens"],
    ]


def pack(value: Any) -> str:
    """Returns a value as base64 of gzipped JSON.

    The encoding is small, and no text in the value can end the script element that contains it.
    """
    data = json_lines.to_line(value).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def follow(run: str, *, seconds: float = 1.0) -> None:
    """Prints the steps and findings of a run as they appear, until the run ends.

    Args:
        run: Run directory.
        seconds: Polling interval.

    Raises:
        UserError: The directory is not a run.
    """
    folder = Path(run)
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: not a run directory (no manifest.json)")
    watch = Diagnosis()
    num_printed = 0
    while True:
        # The status is read first, so that no row is missed when the run ends.
        status = RunDirectory.status(folder)
        rows = read_metrics(folder / "metrics.jsonl")
        for row in rows[num_printed:]:
            _print_row(row)
            for finding in watch.add_row(row):
                print(f"  {finding.rule}: {finding.text}")
        num_printed = len(rows)
        sys.stdout.flush()
        if status != "running":
            print(f"{folder}: {status}")
            return
        time.sleep(seconds)


def _print_row(row: Mapping[str, Any]) -> None:
    words = [f"step {row['step']:>5}"]
    for key in FOLLOWED_METRICS:
        if isinstance(row.get(key), (int, float)):
            words.append(f"{key} {row[key]:.4g}")
    print("  ".join(words))
