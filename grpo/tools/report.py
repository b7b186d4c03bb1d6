"""`grpo report`: shows runs as one HTML file that needs no network.

It also writes the same charts as files for a paper, or follows a running run in the terminal.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from grpo.metrics.diagnosis import Watch, findings
from grpo.run.directory import RunDirectory, read_manifest, read_metrics, write_file
from grpo.tools.charts import charts, series
from grpo.types import UserError

TEMPLATE = Path(__file__).with_name("report.html")
MAX_CHARS = 40_000_000  # of completions in the page; of a longer run every n-th step is in it
MAX_TEXT = 40_000  # of one completion


def report(runs: Sequence[str], *, output: str | None, plots: str | None) -> None:
    """Writes the page, and with `plots` every chart as SVG and PNG. Raises UserError.

    The page is `output`, by default report.html in the first run.
    """
    folders = expand(runs)
    rows = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    figures = charts(rows)
    if plots:
        _write_plots(Path(plots), figures)
    page = Path(output) if output else Path(runs[0]) / "report.html"
    table = Path(runs[0]) / "table.json"
    is_pipeline = "stages" in read_manifest(Path(runs[0]))
    parts = {
        "title": html.escape(", ".join(folders)),
        "facts": _facts(folders, rows, page.parent),
        "findings": _findings(rows),
        "stages": _stages(json.loads(table.read_text())) if is_pipeline and table.exists() else "",
        "charts": "\n".join(_figure(title, figure) for title, figure in figures.items()),
        "data": pack(completions(folders)),
    }
    write_file(page, re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], TEMPLATE.read_text()))
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def _write_plots(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes every chart as SVG and PNG, named by its title."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        name = re.sub("[ /]+", "_", title.lower())
        for kind in ("svg", "png"):
            figure.savefig(folder / f"{name}.{kind}", dpi=200)
    print(f"{len(figures)} charts in {folder}")


def expand(runs: Sequence[str]) -> dict[str, Path]:
    """Returns the runs' folders by name; of a pipeline its stages that have metrics of their own.

    Raises UserError for one that is none.
    """
    folders: dict[str, Path] = {}
    for run in map(Path, runs):
        stages = [run / name for name in read_manifest(run).get("stages", ())]
        with_metrics = [
            folder for folder in (stages or [run]) if (folder / "metrics.jsonl").exists()
        ]
        if not with_metrics:
            raise UserError(f"{run}: no run in it (no metrics.jsonl)")
        for folder in with_metrics:
            is_evaluation = bool(stages) and "-" in folder.name  # it is in the pipeline's table
            if not is_evaluation:
                name = folder.name if folder.name not in folders else str(folder)
                folders[name] = folder
    return folders


def _figure(title: str, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1
    )
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _facts(
    folders: Mapping[str, Path], rows: Mapping[str, Sequence[Mapping[str, Any]]], beside: Path
) -> str:
    lines = [
        "<tr><th>run</th><th>stage</th><th>status</th><th>model</th>"
        "<th>data</th><th>recipe</th><th>seed</th><th>steps</th>"
    ]
    lines[0] += "<th>held-out accuracy</th><th>commit</th></tr>"
    for name, folder in folders.items():
        manifest = read_manifest(folder)
        config = (
            yaml.safe_load((folder / "config.yaml").read_text())
            if (folder / "config.yaml").exists()
            else {}
        )
        judged = [value for _, value in series(rows[name], "eval/accuracy")]
        cells = [
            manifest.get("stage", ""),
            manifest.get("status", ""),
            config.get("model", {}).get("path", ""),
            config.get("data", {}).get("name")
            or ", ".join(config.get("data", {}).get("mixture", {})),
            config.get("algorithm", {}).get("preset", ""),
            manifest.get("seed", ""),
            max([0, *(row["step"] for row in rows[name])]),
            f"{judged[0]:.1%} to {judged[-1]:.1%}"
            if len(judged) > 1
            else f"{judged[0]:.1%}"
            if judged
            else "",
            str(manifest.get("commit") or "")[:10],
        ]
        target = html.escape(quote(os.path.relpath(folder, beside)))
        link = f'<td><a href="{target}">{html.escape(name)}</a></td>'
        lines.append(
            f"<tr>{link}"
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
            + "</tr>"
        )
    return "\n".join(lines)


def _findings(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    found = [
        (name if len(rows) > 1 else "", finding)
        for name, run in rows.items()
        for finding in findings(run)
    ]
    told = [
        f"<li><b>{html.escape(name)} step {one.step}, {one.rule}</b>: {html.escape(one.text)}</li>"
        for name, one in found
    ]
    return "\n".join(told) or "<li>Nothing to report: no rule of the diagnosis applies.</li>"


def _stages(table: Sequence[Mapping[str, Any]]) -> str:
    sets = list(dict.fromkeys(key for row in table for key in row if key != "stage"))
    lines = [
        "<tr><th>stage</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in sets) + "</tr>"
    ]
    for row in table:
        cells = [
            f"{row[name]['accuracy']:.1%}" if "accuracy" in row.get(name, {}) else ""
            for name in sets
        ]
        lines.append(
            f"<tr><td>{html.escape(row['stage'])}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return "<h2>Stages</h2><div class=wide><table>" + "\n".join(lines) + "</table></div>"


def completions(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Returns what the page shows of completions.

    The problems come once, then rows `[file, problem, text, reward, parts, verdict, ...]`.
    """
    files = [
        (name, file)
        for name, folder in folders.items()
        for file in sorted((folder / "samples").glob("*.jsonl"))
    ]
    total = sum(file.stat().st_size for _, file in files)
    stride = -(-total // MAX_CHARS)
    kept = [pair for i, pair in enumerate(files) if i % stride == 0 or i == len(files) - 1]
    problems: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    rows: list[list[Any]] = []
    for number, (_, file) in enumerate(kept):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            place = places.setdefault(row["problem"], len(places))
            problems.setdefault(row["problem"], [row["problem"], row["question"], row["answer"]])
            text = row["completion"]
            shown = (
                text
                if len(text) <= MAX_TEXT
                else f"{text[: MAX_TEXT // 2]}\n[... whole in {file} ...]\n{text[-MAX_TEXT // 2 :]}"
            )
            judged = [row["reward"], row["parts"], row.get("verdict") or "", row.get("reason")]
            rows.append(
                [
                    number,
                    place,
                    shown,
                    *judged,
                    row["finish_reason"] == "length",
                    row.get("advantage"),
                    row["tokens"],
                ]
            )
    left_out = (
        ""
        if stride == 1
        else f"{len(kept)} of {len(files)} files of samples are in this page; all lie in samples/."
    )
    names = [f"{name} {file.stem}" if len(folders) > 1 else file.stem for name, file in kept]
    return {"files": names, "problems": list(problems.values()), "rows": rows, "note": left_out}


def pack(value: Any) -> str:
    """Returns a value as base64 of gzipped JSON.

    It is small, and no text in it can end the script element that holds it.
    """
    return base64.b64encode(
        gzip.compress(json.dumps(value, ensure_ascii=False).encode(), 6, mtime=0)
    ).decode()


def follow(run: str, *, seconds: float = 1.0) -> None:
    """Prints a run's steps and findings as they come, until it ends.

    Raises UserError when there is none.
    """
    folder, shown, watch = Path(run), 0, Watch()
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: no run in it (no manifest.json)")
    while True:
        status = RunDirectory.status(folder)
        rows = read_metrics(folder / "metrics.jsonl")
        for row in rows[shown:]:
            keys = (
                "loss",
                "reward/mean",
                "reward/accuracy",
                "eval/accuracy",
                "completion/length",
                "policy/entropy",
                "time/total_s",
            )
            print(
                f"step {row['step']:>5}",
                *(
                    f"{key} {row[key]:.4g}"
                    for key in keys
                    if isinstance(row.get(key), (int, float))
                ),
                sep="  ",
            )
            for finding in watch.see(row):
                print(f"  {finding.rule}: {finding.text}")
        shown = len(rows)
        sys.stdout.flush()
        if status != "running":
            print(f"{folder}: {status}")
            return
        time.sleep(seconds)
