"""A run of the quickstart's model on two servers, killed at random.

Servers, the trainer, all of it. Nothing may be lost.

    .venv/bin/python tests/slow/soak.py --kills 50 [--seed 0] [--async] [--folder runs/soak]

Every problem of the stream is learned from once and in its order, whatever was killed when, and the
held-out accuracy is what it is without kills. Not part of the suite: 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from grpo import config as configs
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.stages.problems import load_problems, mixture


def rows(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async", dest="staleness", action="store_const", const=1, default=0)
    parser.add_argument("--pause", type=float, default=20, help="most seconds between two kills")
    parser.add_argument("--model", default="runs/quickstart/sft/final")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    chance, killed = random.Random(options.seed), Counter[str]()
    subprocess.run(["rm", "-rf", str(options.folder)], check=True)
    overrides = [
        f"run_dir={options.folder}",
        f"model.path={options.model}",
        "model.warm_start=",
        "checkpoint={every: 1, keep_best: null}",
        "eval.every=10",
        f"train.rollouts={options.rollouts}",
        f"train.max_staleness={options.staleness}",
        f"engine.servers={{count: 2, restarts: {options.kills + 1}}}",
    ]
    command = [sys.executable, "-m", "grpo", "train", "configs/tiny.yaml", *overrides]
    log = options.folder.with_suffix(".log").open("w")
    process, had = subprocess.Popen(command, stderr=log), 0
    began = time.monotonic()
    while True:
        if process.poll() is not None:
            assert process.returncode in (0, 1, -9), f"the run refused: see {log.name}"
            manifest = options.folder / "manifest.json"
            if manifest.exists() and json.loads(manifest.read_text())["status"] == "finished":
                break
            process, had = (
                subprocess.Popen([*command, "--auto-resume"], stderr=log),
                len(rows(options.folder)),
            )
        time.sleep(chance.uniform(2, options.pause))
        try:
            family = psutil.Process(process.pid).children(recursive=True)
            servers = [member for member in family if "api_server" in " ".join(member.cmdline())]
            cores = [
                member
                for member in family
                if "EngineCore" in member.name() or "VLLM" in member.name()
            ]
        except psutil.Error:
            continue
        # most kills wait for a step since the start, or there never was one
        moved = len(rows(options.folder)) > had
        if sum(killed.values()) >= options.kills or (not moved and chance.random() < 0.8):
            continue
        what = chance.choice(["server", "core", "trainer"])
        victims = {"server": servers, "core": cores, "trainer": [psutil.Process(process.pid)]}[what]
        if victims:
            chance.choice(victims).kill()
            killed[what] += 1
            print(
                f"{time.monotonic() - began:6.0f} s, step {len(rows(options.folder)) - 1}: killed "
                f"a {what}",
                flush=True,
            )
            if what == "trainer":
                process.wait()
    found = rows(options.folder)
    config = configs.load("configs/tiny.yaml", overrides)
    model_dir = Path(options.model)
    prompts = Prompts(
        config.prompt, models.load_tokenizer(model_dir), models.eos_token_ids(model_dir)
    )
    stream = mixture(
        config.data, load_problems(config.data, "train", config.seed), prompts, config.seed
    )
    used = [
        json.loads(line)["problem"]
        for file in sorted((options.folder / "samples").glob("step-*.jsonl"))
        for line in file.read_text().splitlines()[:: config.train.group_size]
    ]
    wanted = [problem.id for problem in stream.take(0, len(used))]
    print(
        f"{dict(killed)} killed in {time.monotonic() - began:.0f} s; {len(found) - 1} of "
        f"{options.rollouts} steps, each once: "
        f"{[row['rollout'] for row in found] == list(range(options.rollouts + 1))}; {len(used)} "
        "groups used, in order and once: "
        f"{used == wanted}; held out "
        f"{[row['eval/accuracy'] for row in found if 'eval/accuracy' in row]}"
    )
    marks = (str(options.folder), "api_server", "EngineCore")
    time.sleep(5)
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(mark in " ".join(p.info["cmdline"] or ()) for mark in marks)
    ]
    print(
        f"processes left: {len([member for member in left if member.pid != psutil.Process().pid])}"
    )


if __name__ == "__main__":
    main()
