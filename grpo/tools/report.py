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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from grpo.metrics.diagnosis import Watch, findings
from grpo.run.directory import RunDirectory, read_manifest, read_metrics, write_file
from grpo.types import UserError

TEMPLATE = Path(__file__).with_name("report.html")
MAX_CHARS = 40_000_000  # of completions in the page; of a longer run every n-th step is in it
MAX_TEXT = 40_000  # of one completion
CHARTS: dict[str, list[str]] = {  # title -> metrics, those that a run has
    "Reward": ["reward/mean"],
    "Held-out accuracy": ["eval/accuracy"],
    "Rewards": [],  # each of the run's own
    "Share of groups": ["group/all_correct", "group/all_wrong", "group/no_signal"],
    "Share of completions": ["completion/truncated", "reward/undecided", "reward/missing"],
    "Tokens a completion": ["completion/length", "completion/length_max"],
    "Entropy a token": ["policy/entropy"],
    "Loss": ["loss"],
    "Token accuracy": ["policy/token_accuracy"],
    "Gradient norm": ["policy/grad_norm"],
    "KL to the reference": ["kl/ref", "policy/divergence"],
    "Engine against learner": ["mismatch/abs", "mismatch/k3", "probe/gap"],
    "Clipped tokens": ["clip/low", "clip/high"],
    "Versions behind": ["staleness/mean", "staleness/max"],
    "Sampled tokens a second": ["rollout/tokens_per_s"],
    "Idle share": ["idle/engine", "idle/learner"],
}
HISTOGRAMS: dict[str, tuple[str, Callable[[int], str]]] = {  # title -> metric, what bin i holds
    "Completions by tokens": ("histogram/length", lambda i: str(2**i)),
    "Completions by advantage": ("histogram/advantage", lambda i: f"{(i - 8) / 2:g}"),
    "Tokens by age": ("histogram/staleness", str),
}
PHASES = ("rollout", "rewards", "update", "sync", "probe", "eval", "rest")


def report(runs: Sequence[str], *, output: str | None, plots: str | None) -> None:
    """Writes the page, and with `plots` every chart as SVG and PNG. Raises UserError.

    The page is `output`, by default report.html in the first run.
    """
    folders = expand(runs)
    rows = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    made = charts(rows)
    if plots:
        target = Path(plots)
        target.mkdir(parents=True, exist_ok=True)
        for title, figure in made.items():
            for kind in ("svg", "png"):
                figure.savefig(target / f"{re.sub('[ /]+', '_', title.lower())}.{kind}", dpi=200)
        print(f"{len(made)} charts in {target}")
    page = Path(output) if output else Path(runs[0]) / "report.html"
    table = Path(runs[0]) / "table.json"
    parts = {
        "title": html.escape(", ".join(folders)),
        "facts": _facts(folders, rows, page.parent),
        "findings": _findings(rows),
        "stages": _stages(json.loads(table.read_text()))
        if table.exists() and "stages" in read_manifest(Path(runs[0]))
        else "",
        "charts": "\n".join(_figure(title, figure) for title, figure in made.items()),
        "data": pack(completions(folders)),
    }
    write_file(page, re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], TEMPLATE.read_text()))
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def expand(runs: Sequence[str]) -> dict[str, Path]:
    """Returns the runs' folders by name; of a pipeline its stages that have metrics of their own.

    Raises UserError for one that is none.
    """
    found: dict[str, Path] = {}
    for run in map(Path, runs):
        inside = [run / name for name in read_manifest(run).get("stages", ())]
        own = [folder for folder in (inside or [run]) if (folder / "metrics.jsonl").exists()]
        if not own:
            raise UserError(f"{run}: no run in it (no metrics.jsonl)")
        for folder in own:
            name = folder.name if folder.name not in found else str(folder)
            if "-" not in folder.name or not inside:  # a pipeline's evaluations are in its table
                found[name] = folder
    return found


def charts(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns matplotlib figures by title.

    Each run has one colour and each metric one style. Each run's time by phase comes after them.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "grpo",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[key] = "#808080"  # reads on light and on dark
    from matplotlib.figure import Figure

    made: dict[str, Any] = {}
    of_rewards = {
        key for run in rows.values() for row in run for key in row if key.startswith("reward/")
    }
    of_rewards -= {key for metrics in CHARTS.values() for key in metrics}
    for title, metrics in CHARTS.items():
        present = [
            key
            for key in metrics or sorted(of_rewards)
            if any(_series(run, key) for run in rows.values())
        ]
        if not present:
            continue
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for n, (name, run) in enumerate(rows.items()):
            for style, key in enumerate(present):
                if series := _series(run, key):
                    label = " ".join(
                        [
                            *([name] if len(rows) > 1 else []),
                            *([key.partition("/")[2]] if len(present) > 1 else []),
                        ]
                    )
                    colour = f"C{n if len(rows) > 1 else style}"
                    line = ("-", "--", ":", "-.")[style % 4] if len(rows) > 1 else "-"
                    axes.plot(
                        *zip(*series, strict=True),
                        line,
                        color=colour,
                        label=label,
                        marker="." if len(series) < 20 else None,
                    )
        if len(rows) > 1 or len(present) > 1:
            axes.legend(fontsize="x-small", frameon=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        made[title] = figure
    for name, run in rows.items():
        of_run = f", {name}" if len(rows) > 1 else ""
        for title, (key, told) in HISTOGRAMS.items():
            if counts := {row["step"]: row[key] for row in run if sum(row.get(key, ()))}:
                made[title + of_run] = _heat(counts, told)
        if timed := [row for row in run if "time/rollout_s" in row]:
            made[f"Seconds a phase{of_run}"] = _phases(timed)
    return made


def _heat(counts: Mapping[int, Sequence[int]], told: Callable[[int], str]) -> Any:
    """Returns a histogram over the run: a column a step, the fuller the larger the share.

    `counts`: by step; `told`: what bin i holds.
    """
    from matplotlib.figure import Figure

    steps, size = range(min(counts), max(counts) + 1), max(map(len, counts.values()))
    columns = [counts.get(step, ()) for step in steps]
    shares = [
        [column[i] / sum(column) if i < len(column) else 0.0 for column in columns]
        for i in range(size)
    ]
    used = [i for i in range(size) if any(shares[i])]
    shown = range(used[0], used[-1] + 1)
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    extent = (steps[0] - 0.5, steps[-1] + 0.5, shown[0] - 0.5, shown[-1] + 0.5)
    # of none the page's own colour is left
    drawn = [[(0.12, 0.47, 0.71, share**0.5) for share in shares[i]] for i in shown]
    axes.imshow(drawn, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    ticks = shown[:: -(-len(shown) // 9)]
    axes.set_yticks(list(ticks), [told(i) for i in ticks])
    axes.set_xlabel("step")
    return figure


def _phases(rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    total = sum(row["time/total_s"] for row in rows)
    shown = [
        phase
        for phase in PHASES
        if sum(row.get(f"time/{phase}_s") or 0.0 for row in rows) > 0.003 * total
    ]
    axes.stackplot(
        steps,
        [[row.get(f"time/{phase}_s") or 0.0 for row in rows] for phase in shown],
        labels=shown,
        alpha=0.8,
    )
    axes.plot(
        steps,
        [row.get("bound/total_s") or 0.0 for row in rows],
        "--",
        color="#222222",
        label="this machine's bound",
    )
    axes.set_xlabel("step")
    figure.legend(fontsize="x-small", frameon=False, ncols=4, loc="outside lower center")
    return figure


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


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
        judged = [value for _, value in _series(rows[name], "eval/accuracy")]
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
