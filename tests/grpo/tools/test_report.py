"""The report.

What is in the page, that hostile text stays text, and the page in a real Chromium (where there is
one).
"""

import base64
import gzip
import json
import re
import shutil
import subprocess
import threading

import pytest

from grpo.tools import report
from grpo.types import UserError

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> {{data}} \\u2028"
)


def make_run(folder, steps=4, groups=5, size=4, text="plain", **row):
    (folder / "samples").mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"stage": "train", "status": "finished", "seed": 0, "commit": "abc"})
    )
    (folder / "config.yaml").write_text(
        "model: {path: tiny-qwen2}\ndata: {name: arithmetic}\nalgorithm: {preset: grpo}\n"
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            values = {
                "step": step,
                "reward/mean": step / steps,
                "reward/accuracy": step / steps,
                "eval/accuracy": 0.5 + 0.1 * step,
                "completion/length": 30.0,
                "time/rollout_s": 1.0,
                "time/update_s": 2.0,
                "time/total_s": 3.2,
                "bound/total_s": 1.0,
                "histogram/length": [0, 4, 16 - step],
                "histogram/advantage": [0] * 7 + [3, 10, 3] + [0] * 7,
            }
            file.write(json.dumps(values | row) + "\n")
    for step in range(1, steps + 1):
        lines = [
            {
                "problem": f"p{n}",
                "question": f"What is {n} + 1?",
                "answer": str(n + 1),
                "completion": f"<think>{n}</think> {text} {i}",
                "tokens": 20,
                "finish_reason": "length" if i == 3 else "stop",
                "reward": float(i == 0),
                "parts": {"accuracy": float(i == 0)},
                "verdict": ["correct", "wrong", "undecided", "wrong"][i],
                "reason": "",
                "advantage": 0.5,
            }
            for n in range(groups)
            for i in range(size)
        ]
        (folder / "samples" / f"step-{step:06d}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    return folder


def page_of(*runs, **options):
    report.report([str(run) for run in runs], **{"output": None, "plots": None} | options)
    return (runs[0] / "report.html").read_text()


def test_a_page_has_the_runs_facts_findings_charts_and_completions_and_asks_no_network(
    tmp_path, capsys
):
    page = page_of(
        make_run(tmp_path / "a", 12, **{"reward/undecided": 0.4, "reward/mine:brevity": 0.1}),
        make_run(tmp_path / "b"),
    )
    assert (
        "60.0% to 170.0%" in page
        and "tiny-qwen2" in page
        and "40% of completions are undecided" in page
    )
    assert "mine:brevity" in page and 'href="."' in page and 'href="../b"' in page
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert {
        "Reward",
        "Held-out accuracy",
        "Seconds per phase, a",
        "Seconds per phase, b",
        "Completions by tokens, a",
        "Rewards",
    } <= set(titles)
    assert not re.search(r"(src|href)=.?https?:", page)
    packed = re.search(r"id=data>(.*?)</script>", page)[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert (
        len(data["rows"]) == 16 * 20
        and data["files"][0] == "a step-000001"
        and len(data["problems"]) == 5
    )


def test_a_histogram_shows_the_bins_that_are_in_use_by_what_they_hold(tmp_path):
    rows = report.read_metrics(make_run(tmp_path / "a") / "metrics.jsonl")
    rows[1]["histogram/length"] = [0]  # a step without one keeps its place
    made = report.charts({"a": rows})
    lengths, values = (made[f"Completions by {what}"].axes[0] for what in ("tokens", "advantage"))
    assert [tick.get_text() for tick in lengths.get_yticklabels()] == ["2", "4"]
    assert [tick.get_text() for tick in values.get_yticklabels()] == ["-0.5", "0", "0.5"]
    image = lengths.images[0].get_array()
    assert (
        image.shape == (2, 4, 4)
        and image[1, 3, 3] == pytest.approx((12 / 16) ** 0.5)
        and not image[:, 1, 3].any()
    )
    assert lengths.images[0].get_extent() == [0.5, 4.5, 0.5, 2.5]


def test_hostile_text_stays_text(tmp_path):
    page = page_of(make_run(tmp_path / "<b>run", text=HOSTILE))
    assert page.count("</script>") == 2 and "&lt;b&gt;run" in page and "<b>run" not in page


def test_of_a_long_run_every_nth_step_and_of_a_long_completion_both_ends_are_in_the_page(
    tmp_path, monkeypatch
):
    folder = make_run(tmp_path / "a", 10, text="x" * 3000)
    monkeypatch.setattr(
        report, "MAX_SAMPLE_BYTES", 4 * len((folder / "samples" / "step-000001.jsonl").read_text())
    )
    monkeypatch.setattr(report, "MAX_TEXT_CHARS", 100)
    data = report.completions({"a": folder})
    assert (
        data["files"] == ["step-000001", "step-000004", "step-000007", "step-000010"]
        and "4 of 10 files" in data["note"]
    )
    assert "complete text in" in data["rows"][0][2] and len(data["rows"][0][2]) < 300


def test_a_pipelines_report_has_its_stage_table_and_its_stages(tmp_path):
    make_run(tmp_path / "rl")
    make_run(tmp_path / "rl-sums")
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": ["rl", "rl-sums", "never"]}))
    (tmp_path / "table.json").write_text(json.dumps([{"stage": "rl", "sums": {"accuracy": 0.875}}]))
    page = page_of(tmp_path)
    assert "87.5%" in page and list(report.expand([str(tmp_path)])) == ["rl"]


def test_charts_are_written_for_papers(tmp_path):
    page_of(make_run(tmp_path / "a"), plots=str(tmp_path / "plots"))
    assert (tmp_path / "plots" / "reward.svg").exists() and (
        tmp_path / "plots" / "held-out_accuracy.png"
    ).stat().st_size > 1000


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.report([str(tmp_path)], output=None, plots=None)
    with pytest.raises(UserError, match="not a run directory"):
        report.follow(str(tmp_path))


def test_following_prints_steps_and_findings_until_the_run_ends(tmp_path, capsys):
    folder = make_run(tmp_path / "a", 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))

    def more():
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(3, 9):
                file.write(
                    json.dumps({"step": step, "reward/mean": 0.1, "group/all_wrong": 0.9}) + "\n"
                )
        (folder / "manifest.json").write_text(json.dumps(manifest))

    timer = threading.Timer(0.3, more)
    timer.start()
    report.follow(str(folder), seconds=0.05)
    told = capsys.readouterr().out
    assert (
        told.count("step ") >= 8
        and "too_hard: 90% of groups are all wrong" in told
        and told.rstrip().endswith("a: finished")
    )


PROGRAM = """
<script>
const problems = [];
window.addEventListener("error", event => problems.push(event.message));
window.addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
const log = console.error;
console.error = (...words) => { problems.push(words.join(" ")); log(...words); };
const wait = ms => new Promise(done => setTimeout(done, ms));
const set = async (id, value, kind) => {
  $(id).value = value;
  $(id).dispatchEvent(new Event(kind || "change"));
  await wait(400);
};
const count = () => $("count").textContent;
const key = async name => {
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
  await wait(50);
};
addEventListener("load", async () => {
  while (!$("count").textContent) await wait(50);
  const seen = {first: count()};
  await set("file", ""); seen.all = count();
  seen.cards = document.querySelectorAll("article").length;
  await key("ArrowRight"); seen.second = count(); await key("ArrowLeft"); seen.back = count();
  await set("kind", "correct"); seen.right = count();
  seen.classes = [...new Set([...document.querySelectorAll(".completion")].map(e => e.className))];
  await set("kind", "truncated"); seen.cut = count();
  await set("kind", ""); await set("query", "What is 3", "input"); seen.search = count();
  await set("query", "no such words", "input"); seen.nothing = count();
  await set("query", "", "input"); await set("problem", "1"); seen.problem = count();
  await key("/"); seen.focus = document.activeElement.id;
  seen.thoughts = document.querySelector(".completion details pre").textContent;
  seen.title = document.title; seen.problems = problems;
  seen.wide = document.documentElement.scrollWidth <= innerWidth;
  const text = JSON.stringify(seen);
  const shown = Object.assign(document.createElement("pre"), {id: "seen", textContent: text});
  document.body.replaceChildren(shown);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_search_filter_paging_and_keys_work_without_an_error(tmp_path):
    page = page_of(make_run(tmp_path / "a", text=HOSTILE))
    (tmp_path / "page.html").write_text(
        page.replace('<script>\n"use strict"', PROGRAM + '<script>\n"use strict"')
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=390,800",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["problems"] == [] and seen["title"] == "a" and seen["wide"]
    assert seen["first"] == "20 completions of 5 groups, page 1 of 1"
    assert (
        seen["all"] == seen["back"] == "80 completions of 20 groups, page 1 of 3"
        and seen["cards"] == 8
    )
    assert (
        seen["second"].endswith("page 2 of 3")
        and seen["right"].startswith("20 completions")
        and seen["classes"] == ["completion correct"]
    )
    assert seen["cut"].startswith("20 completions") and seen["search"].startswith(
        "16 completions of 4 groups"
    )
    assert seen["nothing"].startswith("0 completions") and seen["problem"].startswith(
        "16 completions of 4 groups"
    )
    assert seen["focus"] == "query" and seen["thoughts"] == "<think>1</think>"
