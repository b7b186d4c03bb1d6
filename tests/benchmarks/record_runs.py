"""Records the results of small runs, to show that a change of the code changes no result.

    .venv/bin/python tests/benchmarks/record_runs.py OUTPUT.json [--only NAME ...]
    .venv/bin/python tests/benchmarks/record_runs.py --compare BEFORE.json AFTER.json \\
        [--ignore PREFIX ...]

Recording takes 10 minutes on 2 cores. Record twice on the old commit and once on the new commit, on
a quiet machine. On a CPU results are equal bit for bit; a difference between the two recordings of
the old commit is not caused by the change. Comparing prints the differences of each run (of its
metrics only the first one) and exits with 1, or prints `equal`. --ignore omits the metrics whose
names begin with one of the given prefixes.

The script uses only the command line and the files in the run directories. A record contains

- the SHA-256 of every model file,
- every metric that is not a time or a rate,
- the SHA-256 of all kept completions with their rewards and advantages.

The run with two servers is not reproducible, because requests arrive at a server in a different
order each time. Only the names of its metrics, its number of completions and the limit of its probe
are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
# Prefixes of metrics that depend on the speed of the machine.
UNRECORDED = (
    "time/",
    "bound/",
    "idle/",
    "machine/",
    "sync/seconds",
    "update/seconds",
    "rollout/tokens_per_s",
    "verifier/",
    "queue/",
    "engine/",
)
MAX_GAP = 0.2  # limit of the probe in bfloat16 (grpo/training/weight_sync.py)
TIMEOUT_S = 900

NO_CHECKPOINTS = "checkpoint.every=0"
NO_EVALUATION = "eval.every=0"


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    command: list[str]  # arguments of `grpo`, without run_dir
    ranks: int = 1
    exact: bool = True  # False: batches, and therefore the last bits, differ between executions


def runs(folder: Path) -> list[Run]:
    """Returns the runs in order. Later runs start from the models of earlier runs."""
    train = [
        "train",
        "configs/tiny.yaml",
        f"model.path={folder}/sft/final",
        "model.warm_start=",
        "checkpoint.keep_best=",
        NO_CHECKPOINTS,
        NO_EVALUATION,
    ]
    two_rollouts = [*train, "train.rollouts=2"]
    two_updates_kl = ["train.updates_per_rollout=4", "algorithm.kl_coef=0.02"]
    dapo = ["algorithm={preset: dapo, no_signal: drop}", "train.updates_per_rollout=2"]
    gspo_padded = ["algorithm={preset: gspo}", "model.attention=sdpa"]
    lora = ["model.lora={rank: 8}", "learner.zero_stage=1"]
    return [
        Run("sft", ["sft", "configs/tiny_sft.yaml", NO_CHECKPOINTS]),
        Run("grpo", [*train, "train.rollouts=4"]),
        Run("two_updates_kl", [*two_rollouts, *two_updates_kl]),
        Run("dapo", [*two_rollouts, *dapo]),
        Run("gspo_padded", [*two_rollouts, *gspo_padded]),
        Run("lora", [*two_rollouts, *lora]),
        *runs_with_trained_model(folder),
        Run("two_ranks", [*two_rollouts, "learner.zero_stage=2"], ranks=2),
        Run("two_servers", [*two_rollouts, "engine.servers={count: 2}"], exact=False),
    ]


def runs_with_trained_model(folder: Path) -> list[Run]:
    """Returns the runs that start from, or learn from, the final model of the run `grpo`."""
    trained_model = f"{folder}/grpo/final"
    collect = [
        "collect",
        "configs/tiny_collect.yaml",
        f"model.path={trained_model}",
        "collect.problems=200",
        "collect.chunk=100",
    ]
    distill = [
        "distill",
        "configs/tiny_distill.yaml",
        f"model.teacher={trained_model}",
        f"data.path={folder}/collect",
        "soft.updates=40",
    ]
    on_policy = [
        "distill",
        "configs/tiny_distill.yaml",
        f"model.path={folder}/sft/final",
        f"model.teacher={trained_model}",
        "way=on_policy",
        "soft=null",
        "data={name: arithmetic, options: {digits: 3}}",
        "train={rollouts: 2, problems: 16, group_size: 8}",
        "learner.lr=1e-4",
        NO_CHECKPOINTS,
        NO_EVALUATION,
    ]
    evaluate = [
        "eval",
        "configs/tiny.yaml",
        f"model.path={trained_model}",
        "model.warm_start=",
        "eval.problems=100",
    ]
    quantize = [
        "quantize",
        "configs/tiny_quantize.yaml",
        f"model.path={trained_model}",
        "quantize.schemes=[int8]",
        "eval.problems=100",
    ]
    return [
        Run("collect", collect),
        Run("distill", distill),
        Run("on_policy", on_policy),
        Run("eval", evaluate),
        Run("int8", quantize),
    ]


def record_all(output: Path, folder: Path, only: list[str]) -> None:
    """Executes the runs and writes their records. A failed run is recorded with its exit code.

    Args:
        output: The JSON file to write. It contains a record per run, by the name of the run.
        folder: Directory for the run directories. It is deleted first if `only` is empty.
        only: Names of the runs to execute; empty for all. The models of earlier runs that they
            use must exist in `folder`.
    """
    if not only:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    for run in runs(folder):
        if only and run.name not in only:
            continue
        run_dir = folder / run.name
        shutil.rmtree(run_dir, ignore_errors=True)
        log = folder / f"{run.name}.log"
        exit_code = execute(run, run_dir, log)
        if exit_code == 0:
            records[run.name] = record(run_dir, exact=run.exact)
            print(f"{run.name}: {records[run.name]['num_completions']} completions", flush=True)
        else:
            records[run.name] = {"exit_code": exit_code}
            last_lines = log.read_text().strip().splitlines()[-1:]
            print(f"{run.name}: exit code {exit_code}: {last_lines}", flush=True)
    output.write_text(json.dumps(records, indent=1))


def execute(run: Run, run_dir: Path, log: Path) -> int:
    """Runs `grpo`, writes its output to `log` and returns its exit code."""
    launcher: list[str] = []
    if run.ranks > 1:
        launcher = [
            str(BIN / "python"),
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={run.ranks}",
            "--no-python",
        ]
    command = [*launcher, str(BIN / "grpo"), *run.command, f"run_dir={run_dir}"]
    with log.open("w") as stream:
        result = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=TIMEOUT_S)
    return result.returncode


def record(run_dir: Path, *, exact: bool) -> dict[str, Any]:
    """Returns the record of a finished run.

    For example `{"exact": True, "final/model.safetensors": "5f2c...", "metrics": [{"rollout": 0,
    ...}, ...], "completions": "90ab...", "num_completions": 1536}`.
    """
    result: dict[str, Any] = {"exact": exact}
    for file in sorted(run_dir.rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            result[str(file.relative_to(run_dir))] = hashlib.sha256(file.read_bytes()).hexdigest()
    metrics_file = run_dir / "metrics.jsonl"
    if metrics_file.exists():
        rows = [json.loads(line) for line in read_lines(metrics_file)]
        result["metrics"] = [recorded_metrics(row) for row in rows]
    completions = kept_completions(run_dir)
    result["completions"] = hashlib.sha256(json.dumps(completions).encode()).hexdigest()
    result["num_completions"] = len(completions)
    return result


def recorded_metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(UNRECORDED)}


def kept_completions(run_dir: Path) -> list[list[Any]]:
    """Returns the completions in samples/ with file, reward and advantage, and then the traces."""
    completions: list[list[Any]] = []
    for file in sorted((run_dir / "samples").glob("*.jsonl")):
        for line in read_lines(file):
            row = json.loads(line)
            completions.append(
                [file.name, row.get("completion"), row.get("reward"), row.get("advantage")]
            )
    traces_file = run_dir / "traces.jsonl"
    if traces_file.exists():
        completions += [[line] for line in read_lines(traces_file)]
    return completions


def read_lines(file: Path) -> list[str]:
    """Returns the non-empty lines of a file.

    `splitlines` would also split at other separators, which may occur inside a JSON string.
    """
    return [line for line in file.read_text().split("\n") if line]


def compare(before: Path, after: Path, ignored: tuple[str, ...]) -> int:
    """Prints the differences of each run, or `equal`, and returns the exit code.

    Metrics whose names begin with one of the prefixes in `ignored` are not compared.
    """
    records_before = read_records(before, ignored)
    records_after = read_records(after, ignored)
    messages = []
    for name, record_before in records_before.items():
        for message in differences(record_before, records_after.get(name, {})):
            messages.append(f"{name}: {message}")
    print("\n".join(messages) if messages else "equal")
    return 1 if messages else 0


def read_records(file: Path, ignored: tuple[str, ...]) -> dict[str, Any]:
    records: dict[str, Any] = json.loads(file.read_text())
    for record in records.values():
        rows = record.get("metrics", [])
        if not record.get("exact", True) or not isinstance(rows, list):
            continue
        for row in rows:
            for name in [name for name in row if name.startswith(ignored)]:
                del row[name]
    return records


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the differences between two records of a run, of the metrics only the first one."""
    if not before.get("exact", True):
        return differences_of_inexact_run(before, after)
    messages = []
    for key in sorted(before.keys() | after.keys()):
        old = before.get(key)
        new = after.get(key)
        if old == new:
            continue
        if key == "metrics" and isinstance(old, list) and isinstance(new, list):
            messages.append(first_changed_metric(old, new))
        else:
            messages.append(f"{key}: {str(old)[:60]} became {str(new)[:60]}")
    return messages


def first_changed_metric(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    if len(before) != len(after):
        return f"metrics: {len(before)} rows became {len(after)}"
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"metrics, row {number}: {key}: {old.get(key)} became {new.get(key)}"
    return "metrics: a metric that is null in one record is missing in the other"


def differences_of_inexact_run(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the differences of a run that is not reproducible.

    Compares the names of the metrics and the number of completions, and compares the gaps of the
    probe with their limit.
    """
    messages = []
    names_before = [sorted(row) for row in before.get("metrics", [])]
    names_after = [sorted(row) for row in after.get("metrics", [])]
    if names_before != names_after:
        messages.append("metrics: the names or the number of rows differ")
    count_before = before.get("num_completions")
    count_after = after.get("num_completions")
    if count_before != count_after:
        messages.append(f"completions: {count_before} became {count_after}")
    gaps = [row["probe/gap"] for row in after.get("metrics", []) if "probe/gap" in row]
    if not gaps or max(gaps) > MAX_GAP:
        messages.append(f"probe/gap: {gaps}, allowed {MAX_GAP}")
    return messages


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/recorded"))
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PREFIX")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare, tuple(options.ignore))
    if options.output is None:
        parser.error("output path missing: pass OUTPUT.json")
    record_all(options.output, options.folder.resolve(), options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
