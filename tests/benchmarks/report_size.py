"""Measures the report of a run with 20,000 completions of 300 tokens: build time, size, browser.

    .venv/bin/python tests/benchmarks/report_size.py [--completions 20000]

Prints the time that `grpo report` takes and the size of the page. If Chromium is installed, also
prints (headless):

- the additional time, compared with an empty page, until the completions are decompressed and the
  first page of them is shown,
- the time of a search, a filter and a change of page in all completions, each the mean of ten.

Figures in docs/benchmarks.md, first table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from grpo.tools.report import report

SENTENCE = (
    "so we add the two numbers and carry one to the next column then check that 17 times 23 is 391 "
    "which is right"
)
WORDS = SENTENCE.split()
GROUP_SIZE = 8
COMPLETIONS_PER_STEP = 512
COMPLETION_WORDS = 300
METRICS = ("reward/mean", "reward/accuracy", "completion/length", "time/total_s")
SAMPLE = {
    "question": "How much is it?",
    "answer": "391",
    "reward": 1.0,
    "tokens": 300,
    "parts": {"accuracy": 1.0},
    "finish_reason": "stop",
    "verdict": "correct",
    "reason": "",
    "advantage": 0.1,
}

NUM_ACTIONS = 10
# JavaScript of action number `i` on all completions, not only on those of one step.
ACTIONS = {
    "search": 'await set("query", `carry one to the next column ${i}`, "input")',
    "filter": 'await set("kind", i % 2 ? "correct" : "")',
    "page": "document.body.dispatchEvent(new "
    'KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})); await wait(50)',
}
# A script for the report's page. It executes ACTION COUNT times and then changes the page's title.
PROGRAM = """
<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
const set = async (id, value, kind) => {
  $(id).value = value;
  $(id).dispatchEvent(new Event(kind || "change"));
  await wait(400);
};
addEventListener("load", async () => {
  while (!$("count").textContent) await wait(50);
  await set("file", "");
  for (let i = 0; i < COUNT; i++) { ACTION; }
  document.title = "all done";
});
</script>
"""
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--virtual-time-budget=20000",
    "--dump-dom",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--completions", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        write_run(run_dir, options.completions)
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            report([str(run_dir)], output=None, plots=None)
        build_s = time.monotonic() - start
        page = run_dir / "report.html"
        print(f"built in {build_s:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
        if shutil.which("chromium"):
            time_browser(page, Path(scratch) / "empty.html")


def write_run(run_dir: Path, num_completions: int) -> None:
    """Writes the metrics and samples of a run with random texts."""
    (run_dir / "samples").mkdir(parents=True)
    generator = random.Random(0)
    with (run_dir / "metrics.jsonl").open("w") as metrics_file:
        for step in range(1, num_completions // COMPLETIONS_PER_STEP + 1):
            row = {"step": step} | {key: generator.random() for key in METRICS}
            metrics_file.write(json.dumps(row) + "\n")
            samples_file = run_dir / "samples" / f"step-{step:06d}.jsonl"
            samples_file.write_text("".join(sample_lines(generator, step)))


def sample_lines(generator: random.Random, step: int) -> list[str]:
    """Returns the lines of a step's file in samples/."""
    lines = []
    for i in range(COMPLETIONS_PER_STEP):
        thoughts = " ".join(generator.choices(WORDS, k=COMPLETION_WORDS))
        sample = {
            **SAMPLE,
            "problem": f"p{step * COMPLETIONS_PER_STEP + i // GROUP_SIZE}",
            "completion": f"<think>{thoughts}</think> <answer>391</answer>",
        }
        lines.append(json.dumps(sample) + "\n")
    return lines


def time_browser(page: Path, empty_page: Path) -> None:
    """Prints the time to open the page and the time of each action."""
    empty_page.write_text("<!doctype html><title>x</title>")
    page_s = browser_seconds(page, 'class="completion correct"')
    empty_page_s = browser_seconds(empty_page)
    print(f"opens in {page_s - empty_page_s:.1f} s more than an empty page")
    times = [
        f"{name} {1000 * action_seconds(page, action):.0f} ms" for name, action in ACTIONS.items()
    ]
    print(", ".join(times))


def action_seconds(page: Path, action: str) -> float:
    """Returns the time of one action on the open page."""
    without_actions_s = page_with_actions_seconds(page, action, 0)
    with_actions_s = page_with_actions_seconds(page, action, NUM_ACTIONS)
    return (with_actions_s - without_actions_s) / NUM_ACTIONS


def page_with_actions_seconds(page: Path, action: str, count: int) -> float:
    """Returns the time to open the page and execute an action `count` times."""
    program = PROGRAM.replace("COUNT", str(count)).replace("ACTION", action)
    script_start = '<script>\n"use strict"'
    changed_page = page.with_name("with_actions.html")
    changed_page.write_text(page.read_text().replace(script_start, program + script_start))
    return browser_seconds(changed_page, "<title>all done</title>")


def browser_seconds(page: Path, expected_text: str = "") -> float:
    """Returns the time from the start of Chromium to its end, the median of three.

    Chromium ends after it has printed the document, which must contain `expected_text`.
    """
    times = []
    for _ in range(3):
        start = time.monotonic()
        result = subprocess.run(
            ["chromium", *CHROMIUM_FLAGS, f"file://{page}"], capture_output=True, text=True
        )
        times.append(time.monotonic() - start)
        assert expected_text in result.stdout, f"the page does not contain {expected_text}"
    return statistics.median(times)


if __name__ == "__main__":
    main()
