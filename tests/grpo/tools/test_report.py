"""`grpo report`: the contents of the page, hostile text, and the page in a real Chromium.

The browser test is skipped if Chromium is not installed.
"""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import threading
from random import Random

import pytest

from grpo.tools import report
from grpo.types import UserError

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> {{data}} \\u2028"
)


def make_run(folder, num_steps=4, num_groups=5, group_size=4, text="plain", **metrics):
    """Writes a finished run with `metrics` in each row of metrics.jsonl, and returns its folder.

    The completions of a group are correct, wrong, undecided, and wrong because truncated.
    """
    (folder / "samples").mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"stage": "train", "status": "finished", "seed": 0, "commit": "abc"})
    )
    (folder / "config.yaml").write_text(
        "model: {path: tiny-qwen2}\ndata: {name: arithmetic}\nalgorithm: {preset: grpo}\n"
    )
    rows = [{**metrics_of_step(step, num_steps), **metrics} for step in range(1, num_steps + 1)]
    write_rows(folder / "metrics.jsonl", rows)
    for step in range(1, num_steps + 1):
        samples = []
        for problem in range(num_groups):
            samples += [sample(problem, index, text) for index in range(group_size)]
        write_rows(folder / "samples" / f"step-{step:06d}.jsonl", samples)
    return folder


def metrics_of_step(step, num_steps):
    return {
        "step": step,
        "reward/mean": step / num_steps,
        "reward/accuracy": step / num_steps,
        "eval/accuracy": 0.5 + 0.1 * step,
        "completion/length": 30.0,
        "time/rollout_s": 1.0,
        "time/update_s": 2.0,
        "time/total_s": 3.2,
        "bound/total_s": 1.0,
        "histogram/length": [0, 4, 16 - step],
        "histogram/advantage": [0] * 7 + [3, 10, 3] + [0] * 7,
    }


def sample(problem, index, text):
    return {
        "problem": f"p{problem}",
        "question": f"What is {problem} + 1?",
        "answer": str(problem + 1),
        "completion": f"<think>{problem}</think> {text} {index}",
        "tokens": 20,
        "finish_reason": "length" if index == 3 else "stop",
        "reward": float(index == 0),
        "parts": {"accuracy": float(index == 0)},
        "verdict": ["correct", "wrong", "undecided", "wrong"][index],
        "reason": "",
        "advantage": 0.5,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_page(*runs, plots=None):
    """Writes the report of the runs and returns the HTML."""
    report.report([str(run) for run in runs], output=None, plots=plots)
    return (runs[0] / "report.html").read_text()


def test_a_page_has_metrics_findings_charts_and_completions_and_loads_nothing_from_the_network(
    tmp_path,
):
    metrics = {"reward/undecided": 0.4, "reward/mine:brevity": 0.1}
    run_a = make_run(tmp_path / "a", num_steps=12, **metrics)
    run_b = make_run(tmp_path / "b")
    page = report_page(run_a, run_b)
    assert "60.0% to 170.0%" in page
    assert "tiny-qwen2" in page
    assert "40% of completions are undecided" in page
    assert "mine:brevity" in page
    assert 'href="."' in page
    assert 'href="../b"' in page
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert set(titles) >= {
        "Mean reward",
        "Held-out accuracy",
        "Seconds per phase, a",
        "Seconds per phase, b",
        "Completions by tokens, a",
        "Reward functions",
    }
    assert not re.search(r"(src|href)=.?https?:", page)
    packed = re.search(r"id=data>(.*?)</script>", page)[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert len(data["rows"]) == 16 * 20
    assert data["files"][0] == "a step-000001"
    assert len(data["problems"]) == 5


def test_causes_of_undecided_completions_are_zero_in_the_steps_in_which_they_do_not_occur(tmp_path):
    rows = report.read_metrics(make_run(tmp_path / "a") / "metrics.jsonl")
    assert "Undecided completions by cause" not in report.charts({"a": rows})
    for row in rows:
        row["reward/undecided"] = 0.0
    rows[1]["undecided/worker_lost"] = 0.25
    (line,) = report.charts({"a": rows})["Undecided completions by cause"].axes[0].lines
    assert list(line.get_ydata()) == [0.0, 0.25, *[0.0] * (len(rows) - 2)]


def test_a_histogram_chart_shows_the_nonempty_bins_labelled_by_value(tmp_path):
    rows = report.read_metrics(make_run(tmp_path / "a") / "metrics.jsonl")
    rows[1]["histogram/length"] = [0]  # a step without counts keeps its column
    charts = report.charts({"a": rows})
    length_axes = charts["Completions by tokens"].axes[0]
    advantage_axes = charts["Completions by advantage"].axes[0]
    assert [tick.get_text() for tick in length_axes.get_yticklabels()] == ["2", "4"]
    assert [tick.get_text() for tick in advantage_axes.get_yticklabels()] == ["-0.5", "0", "0.5"]
    image = length_axes.images[0].get_array()  # [bins, steps, RGBA]
    assert image.shape == (2, 4, 4)
    # The opacity is the square root of the share: 12 of 16 completions in step 4.
    assert image[1, 3, 3] == pytest.approx((12 / 16) ** 0.5)
    assert not image[:, 1, 3].any()
    assert length_axes.images[0].get_extent() == [0.5, 4.5, 0.5, 2.5]


def test_hostile_text_is_escaped(tmp_path):
    page = report_page(make_run(tmp_path / "<b>run", text=HOSTILE))
    assert page.count("</script>") == 2
    assert "&lt;b&gt;run" in page
    assert "<b>run" not in page


def test_long_runs_are_thinned_out_and_long_completions_shortened_in_the_middle(
    tmp_path, monkeypatch
):
    folder = make_run(tmp_path / "a", num_steps=10, text="x" * 3000)
    num_chars = len((folder / "samples" / "step-000001.jsonl").read_text())
    monkeypatch.setattr(report, "MAX_TEXT_CHARS", 100)
    data = report.completions({"a": folder}, max_bytes=4 * num_chars)
    assert data["files"] == ["step-000001", "step-000004", "step-000007", "step-000010"]
    assert "4 of 10 files" in data["note"]
    assert "complete text in" in data["rows"][0][2]
    assert len(data["rows"][0][2]) < 300


def test_of_a_file_that_is_too_large_the_page_has_the_first_completions(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", num_steps=1, num_groups=50, text="x" * 3000)
    num_bytes = (folder / "samples" / "step-000001.jsonl").stat().st_size
    data = report.completions({"a": folder}, max_bytes=num_bytes // 4)
    assert len(data["rows"]) == 50
    assert data["note"].startswith(
        "This page contains 1 of 1 files of samples, and of 1 of them the"
    )


def test_a_page_of_texts_that_cannot_be_compressed_stays_below_its_limit(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", num_steps=2, num_groups=1, group_size=1)
    random = Random(0)
    samples = [sample(0, 0, random.randbytes(1500).hex()) for _ in range(100)]
    write_rows(folder / "samples" / "step-000002.jsonl", samples)
    monkeypatch.setattr(report, "MAX_DATA_CHARS", 50_000)
    page = report_page(folder)
    (data,) = re.findall(r"id=data>(.*?)</script>", page)
    assert 10_000 < len(data) <= 50_000


def script_hash(page):
    """Returns the hash of the only script in a page, as a Content-Security-Policy names it."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def test_the_policy_of_the_page_allows_its_own_script_only(tmp_path):
    page = report_page(make_run(tmp_path / "a"))
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert f"script-src '{script_hash(page)}';" in policy
    assert policy.startswith("default-src 'none'; ")


def test_the_name_of_a_reward_may_contain_dollar_signs(tmp_path):
    rows = {"reward/$x_1$ {": 0.5, "reward/_cost$": 0.25}
    assert "$x_1$ {" in report_page(make_run(tmp_path / "a", **rows))


def test_a_run_whose_files_of_samples_are_empty_has_a_report_without_completions(tmp_path):
    folder = make_run(tmp_path / "a", num_steps=2)
    for file in (folder / "samples").iterdir():
        file.write_text("")
    assert report.completions({"a": folder})["rows"] == []


def test_the_report_of_a_pipeline_has_its_table_and_its_stages(tmp_path):
    make_run(tmp_path / "rl")
    make_run(tmp_path / "rl-sums")
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": ["rl", "rl-sums", "never"]}))
    (tmp_path / "table.json").write_text(json.dumps([{"stage": "rl", "sums": {"accuracy": 0.875}}]))
    page = report_page(tmp_path)
    assert "87.5%" in page
    assert list(report.expand([str(tmp_path)])) == ["rl"]


def test_charts_are_written_as_svg_and_png(tmp_path):
    plots = tmp_path / "plots"
    report_page(make_run(tmp_path / "a"), plots=str(plots))
    assert (plots / "mean_reward.svg").exists()
    assert (plots / "held-out_accuracy.png").stat().st_size > 1000


def test_a_directory_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.report([str(tmp_path)], output=None, plots=None)
    with pytest.raises(UserError, match="not a run directory"):
        report.follow(str(tmp_path))


def test_follow_prints_steps_and_findings_until_the_run_ends(tmp_path, capsys):
    folder = make_run(tmp_path / "a", num_steps=2)
    manifest_path = folder / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest_path.write_text(json.dumps({**manifest, "status": "running"}))

    def write_steps_and_finish():
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(3, 9):
                row = {"step": step, "reward/mean": 0.1, "group/all_wrong": 0.9}
                file.write(json.dumps(row) + "\n")
        manifest_path.write_text(json.dumps(manifest))

    threading.Timer(0.3, write_steps_and_finish).start()
    report.follow(str(folder), seconds=0.05)
    output = capsys.readouterr().out
    assert output.count("step ") >= 8
    assert "too_hard: 90% of groups are all wrong" in output
    assert output.rstrip().endswith("a: finished")


# Uses the page as a reader does and replaces its content with the results as JSON.
BROWSER_SCRIPT = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
const log = console.error;
console.error = (...words) => { errors.push(words.join(" ")); log(...words); };
const wait = ms => new Promise(done => setTimeout(done, ms));
const set = async (id, value, kind) => {
  $(id).value = value;
  $(id).dispatchEvent(new Event(kind || "change"));
  await wait(400);
};
const count = () => $("count").textContent;
const press = async name => {
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
  await wait(50);
};
addEventListener("load", async () => {
  while (!$("count").textContent) await wait(50);
  const results = {first_file: count()};
  await set("file", "");
  results.all = count();
  results.num_cards = document.querySelectorAll("article").length;
  await press("ArrowRight");
  results.second_page = count();
  await press("ArrowLeft");
  results.first_again = count();
  await set("kind", "correct");
  results.correct = count();
  const classes = [...document.querySelectorAll(".completion")].map(e => e.className);
  results.correct_classes = [...new Set(classes)];
  await set("kind", "truncated");
  results.truncated = count();
  await set("kind", "");
  await set("query", "What is 3", "input");
  results.search = count();
  await set("query", "no such words", "input");
  results.no_match = count();
  await set("query", "", "input");
  await set("problem", "1");
  results.one_problem = count();
  await press("/");
  results.focused = document.activeElement.id;
  results.reasoning = document.querySelector(".completion details pre").textContent;
  results.title = document.title;
  results.errors = errors;
  document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = true'>");
  await wait(300);
  results.hacked = window.hacked === true;
  results.fits_width = document.documentElement.scrollWidth <= innerWidth;
  const text = JSON.stringify(results);
  const element = Object.assign(document.createElement("pre"), {id: "results", textContent: text});
  document.body.replaceChildren(element);
});
</script>
"""


def run_in_browser(html_path):
    """Opens the page in Chromium and returns the results of BROWSER_SCRIPT."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=390,800",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{html_path}",
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="results">(.*?)</pre>', process.stdout, re.DOTALL)
    assert match, process.stderr[-2000:]
    return json.loads(match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_search_filters_paging_and_keys_work_in_a_browser_without_script_errors(tmp_path):
    page = report_page(make_run(tmp_path / "a", text=HOSTILE))
    script_start = '<script>\n"use strict"'
    html_path = tmp_path / "page.html"
    page = page.replace("script-src ", f"script-src '{script_hash(BROWSER_SCRIPT)}' ")
    html_path.write_text(page.replace(script_start, BROWSER_SCRIPT + script_start))
    results = run_in_browser(html_path)
    assert results["errors"] == []
    assert results["title"] == "a"
    assert not results["hacked"]  # the Content-Security-Policy of the page forbids it
    assert results["fits_width"]
    assert results["first_file"] == "20 completions of 5 groups, page 1 of 1"
    assert results["all"] == "80 completions of 20 groups, page 1 of 3"
    assert results["num_cards"] == 8
    assert results["second_page"].endswith("page 2 of 3")
    assert results["first_again"] == results["all"]
    assert results["correct"].startswith("20 completions")
    assert results["correct_classes"] == ["completion correct"]
    assert results["truncated"].startswith("20 completions")
    assert results["search"].startswith("16 completions of 4 groups")
    assert results["no_match"].startswith("0 completions")
    assert results["one_problem"].startswith("16 completions of 4 groups")
    assert results["focused"] == "query"
    assert results["reasoning"] == "<think>1</think>"
