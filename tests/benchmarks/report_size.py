"""The report of a run with 20,000 completions of 300 tokens.

Seconds to build, size, and in a headless Chromium until it is open, a search has its result, a
filter, another page.

    .venv/bin/python tests/benchmarks/report_size.py [--completions 20000]

Opened: until the completions are unpacked and the first page of them is shown, less the time that
an empty page takes. The others: a tenth of what ten of them add to that.
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
GROUP, STEP = 8, 512


def make_run(folder: Path, count: int) -> None:
    (folder / "samples").mkdir(parents=True)
    draw = random.Random(0)
    common = {
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
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, count // STEP + 1):
            values = {
                key: draw.random()
                for key in ("reward/mean", "reward/accuracy", "completion/length", "time/total_s")
            }
            metrics.write(json.dumps({"step": step} | values) + "\n")
            with (folder / "samples" / f"step-{step:06d}.jsonl").open("w") as file:
                for i in range(STEP):
                    text = (
                        f"<think>{' '.join(draw.choices(WORDS, k=300))}</think> "
                        "<answer>391</answer>"
                    )
                    file.write(
                        json.dumps(
                            common | {"problem": f"p{step * STEP + i // GROUP}", "completion": text}
                        )
                        + "\n"
                    )


ACTIONS = {  # of all completions, not of one step's
    "search": 'await set("query", `carry one to the next column ${i}`, "input")',
    "filter": 'await set("kind", i % 2 ? "correct" : "")',
    "page": "document.body.dispatchEvent(new "
    'KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})); await wait(50)',
}
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


def acted(page: Path, action: str) -> float:
    """Returns the seconds of one action on an open page."""
    seconds = []
    for count in (0, 10):
        program = PROGRAM.replace("COUNT", str(count)).replace("ACTION", action)
        other = page.with_name("acted.html")
        other.write_text(
            page.read_text().replace('<script>\n"use strict"', program + '<script>\n"use strict"')
        )
        seconds.append(opened(other, "<title>all done</title>"))
    return (seconds[1] - seconds[0]) / 10


def opened(page: Path, shown: str = "") -> float:
    """Returns the median seconds of three starts of a browser until it has dumped the page."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run(
            ["chromium", *flags, f"file://{page}"], capture_output=True, text=True
        )
        times.append(time.monotonic() - start)
        assert shown in done.stdout, f"the page did not show {shown}"
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--completions", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        make_run(folder, options.completions)
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            report([str(folder)], output=None, plots=None)
        built, page = time.monotonic() - start, folder / "report.html"
        print(f"built in {built:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
        if shutil.which("chromium"):
            empty = Path(scratch) / "empty.html"
            empty.write_text("<!doctype html><title>x</title>")
            seconds = opened(page, 'class="completion correct"') - opened(empty)
            print(f"opens in {seconds:.1f} s more than an empty page")
            print(
                ", ".join(
                    f"{name} {1e3 * acted(page, action):.0f} ms" for name, action in ACTIONS.items()
                )
            )


if __name__ == "__main__":
    main()
