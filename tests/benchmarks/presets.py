r"""Every preset on the quickstart's 4M model.

Held-out accuracy at the end, rollouts to 90 %, spread over seeds; one markdown table.

    .venv/bin/python tests/benchmarks/presets.py [--seeds 3] [--presets grpo dapo] \
        [--folder runs/presets]

All runs of a seed start from one cold start; the distilled one's teacher is the end of grpo's. A
run that is finished is not done again. SHARED: the same batch arithmetic for all, so that only the
recipe differs; recipes with mini-batches of their own (16 in R1 and DAPO) would need larger
rollouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from grpo.config.presets import PRESETS

SHARED = [
    "train.rollouts=12",
    "train.updates_per_rollout=2",
    "rewards={accuracy: 1.0, format: 0.1}",
    "model.warm_start=",
    "checkpoint.every=0",
]


def run(command: str, config: str, folder: Path, *overrides: str) -> Path:
    manifest = folder / "manifest.json"
    if not (manifest.exists() and json.loads(manifest.read_text())["status"] == "finished"):
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        done = subprocess.run(
            [sys.executable, "-m", "grpo", command, config, f"run_dir={folder}", *overrides],
            stderr=subprocess.PIPE,
            text=True,
        )
        print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "", file=sys.stderr)
        if done.returncode:
            (folder / "failed").write_text(done.stderr)
    return folder


def outcome(folder: Path) -> tuple[float, float | None] | None:
    """Returns the last held-out accuracy, greedy, and the first rollout after which it was 90 %.

    It is measured every fourth.
    """
    if (folder / "failed").exists():
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = next((row["rollout"] for row in rows if row.get("eval/accuracy", 0) >= 0.9), None)
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1], reached


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/presets"))
    options = parser.parse_args()
    starts = [
        run("sft", "configs/tiny_sft.yaml", options.folder / f"sft-{seed}", f"seed={seed}")
        for seed in range(options.seeds)
    ]
    print(
        "| preset | held-out accuracy | spread | rollouts to 90 % | seeds |\n|---|---|---|---|---|"
    )
    for preset in options.presets:
        found = []
        for seed, start in enumerate(starts):
            overrides = [
                f"model.path={start / 'final'}",
                f"seed={seed}",
                f"algorithm={{preset: {preset}}}",
                *SHARED,
            ]
            overrides += (
                [f"model.teacher={options.folder / f'grpo-{seed}' / 'final'}"]
                if preset == "on_policy_distill"
                else []
            )
            found.append(
                outcome(
                    run(
                        "train",
                        "configs/tiny.yaml",
                        options.folder / f"{preset}-{seed}",
                        *overrides,
                    )
                )
            )
        known = [result for result in found if result]
        accuracies = [accuracy for accuracy, _ in known]
        reached = [str(step) if step else "never" for _, step in known]
        shown = f"{statistics.mean(accuracies):.1%}" if accuracies else "failed"
        spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}" if accuracies else ""
        print(
            f"| {preset} | {shown} | {spread} | {', '.join(reached)} | {len(known)} of "
            f"{len(found)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
