"""Records what small runs compute, so that a rebuild can be shown to change nothing.

Bit for bit on a CPU.

    .venv/bin/python tests/benchmarks/record_runs.py OUTPUT.json [--only NAME ...]
    .venv/bin/python tests/benchmarks/record_runs.py --compare BEFORE.json AFTER.json

Recording takes 10 minutes on 2 cores. Comparing prints the first difference of each run and exits
with 1, or prints `equal`.

It uses the command line and the files of the run directories alone. A run's record holds the
SHA-256 of its models, every metric that is not a time or a rate, and the SHA-256 of the kept
completions with rewards and advantages. Record twice on the old commit first, on a quiet machine:
what differs between those two is not due to the rebuild. The run with two servers varies by itself,
because requests arrive at a server in another order each time; of it only the probe's limit and the
metrics' names are compared.
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
MAX_GAP = 0.2  # of the probe in bfloat16 (grpo/training/weight_sync.py)
FINISH_S = 900


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    command: list[str]  # of `grpo`, without run_dir
    ranks: int = 1
    exact: bool = True  # False: batches, and with them the last bits, vary from run to run


def runs(folder: Path) -> list[Run]:
    """Returns the runs in order; later ones start from the models of earlier ones."""
    small = ["checkpoint.every=0", "eval.every=0"]
    start = [f"model.path={folder}/sft/final", "model.warm_start=", "checkpoint.keep_best=", *small]
    train = ["train", "configs/tiny.yaml", *start]
    two_rollouts = [*train, "train.rollouts=2"]
    trained = f"{folder}/grpo/final"
    sums = "data={name: arithmetic, options: {digits: 3}}"
    collected = f"data.path={folder}/collect"
    on_policy = [
        "way=on_policy",
        "soft=null",
        sums,
        "train={rollouts: 2, problems: 16, group_size: 8}",
        "learner.lr=1e-4",
    ]
    return [
        Run("sft", ["sft", "configs/tiny_sft.yaml", "checkpoint.every=0"]),
        Run("grpo", [*train, "train.rollouts=4"]),
        Run(
            "two_updates_kl",
            [*two_rollouts, "train.updates_per_rollout=4", "algorithm.kl_coef=0.02"],
        ),
        Run(
            "dapo",
            [
                *two_rollouts,
                "algorithm={preset: dapo, no_signal: drop}",
                "train.updates_per_rollout=2",
            ],
        ),
        Run("gspo_padded", [*two_rollouts, "algorithm={preset: gspo}", "model.attention=sdpa"]),
        Run("lora", [*two_rollouts, "model.lora={rank: 8}", "learner.zero_stage=1"]),
        Run(
            "collect",
            [
                "collect",
                "configs/tiny_collect.yaml",
                f"model.path={trained}",
                "collect.problems=200",
                "collect.chunk=100",
            ],
        ),
        Run(
            "distill",
            [
                "distill",
                "configs/tiny_distill.yaml",
                f"model.teacher={trained}",
                collected,
                "soft.updates=40",
            ],
        ),
        Run(
            "on_policy",
            [
                "distill",
                "configs/tiny_distill.yaml",
                *start[:1],
                f"model.teacher={trained}",
                *on_policy,
                *small,
            ],
        ),
        Run(
            "eval",
            [
                "eval",
                "configs/tiny.yaml",
                f"model.path={trained}",
                "model.warm_start=",
                "eval.problems=100",
            ],
        ),
        Run(
            "int8",
            [
                "quantize",
                "configs/tiny_quantize.yaml",
                f"model.path={trained}",
                "quantize.schemes=[int8]",
                "eval.problems=100",
            ],
        ),
        Run("two_ranks", [*two_rollouts, "learner.zero_stage=2"], ranks=2),
        Run("two_servers", [*two_rollouts, "engine.servers={count: 2}"], exact=False),
    ]


def record(run_dir: Path, *, exact: bool) -> dict[str, Any]:
    """Returns what a finished run computed."""
    result: dict[str, Any] = {"exact": exact}
    for file in sorted(run_dir.rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            result[str(file.relative_to(run_dir))] = hashlib.sha256(file.read_bytes()).hexdigest()
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().split("\n") if line]
        result["metrics"] = [
            {key: value for key, value in row.items() if not key.startswith(UNRECORDED)}
            for row in rows
        ]
    completions = []
    for file in sorted((run_dir / "samples").glob("*.jsonl")):
        for line in file.read_text().split("\n"):
            if line:
                row = json.loads(line)
                completions.append(
                    [file.name, row.get("completion"), row.get("reward"), row.get("advantage")]
                )
    traces = run_dir / "traces.jsonl"
    if traces.exists():
        completions += [[line] for line in traces.read_text().split("\n") if line]
    result["completions"] = hashlib.sha256(json.dumps(completions).encode()).hexdigest()
    result["num_completions"] = len(completions)
    return result


def record_all(output: Path, folder: Path, only: list[str]) -> None:
    """Writes the records; a run that fails is recorded with its exit code.

    With `only`, the models of earlier runs must be there.
    """
    if not only:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    for run in runs(folder):
        if only and run.name not in only:
            continue
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
        run_dir = folder / run.name
        shutil.rmtree(run_dir, ignore_errors=True)
        log = folder / f"{run.name}.log"
        with log.open("w") as stream:
            command = [*launcher, str(BIN / "grpo"), *run.command, f"run_dir={run_dir}"]
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=FINISH_S
            ).returncode
        if code == 0:
            records[run.name] = record(run_dir, exact=run.exact)
            print(f"{run.name}: {records[run.name]['num_completions']} completions", flush=True)
        else:
            records[run.name] = {"exit_code": code}
            print(
                f"{run.name}: exit code {code}: {log.read_text().strip().splitlines()[-1:]}",
                flush=True,
            )
    output.write_text(json.dumps(records, indent=1))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns, for one run's records, what became another thing."""
    if not before.get("exact", True):
        return differences_of_inexact(before, after)
    messages = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
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
    return "metrics: order of keys"


def differences_of_inexact(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns what differs in metrics' names and number of completions, and gaps of the probe above
    its limit.
    """
    messages = []
    names_before, names_after = (
        [sorted(row) for row in run.get("metrics", [])] for run in (before, after)
    )
    if names_before != names_after:
        messages.append("metrics: other names or another number of rows")
    if before.get("num_completions") != after.get("num_completions"):
        messages.append(
            f"completions: {before.get('num_completions')} became {after.get('num_completions')}"
        )
    gaps = [row["probe/gap"] for row in after.get("metrics", []) if "probe/gap" in row]
    if not gaps or max(gaps) > MAX_GAP:
        messages.append(f"probe/gap: {gaps}, allowed {MAX_GAP}")
    return messages


def compare(before: Path, after: Path) -> int:
    """Prints the first difference of each run, or `equal`; returns the exit code."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    messages = [
        f"{name}: {message}"
        for name in old
        for message in differences(old[name], new.get(name, {}))
    ]
    print("\n".join(messages) if messages else "equal")
    return 1 if messages else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/recorded"))
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.output is None:
        parser.error("where is the record to be written?")
    record_all(options.output, options.folder.resolve(), options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
