"""A run of the quickstart's model on two servers, killed at random: servers, the trainer, all of it. Nothing may be lost.

    .venv/bin/python tests/slow/soak.py --kills 50 [--seed 0] [--async] [--folder runs/soak]

Every problem of the stream is learned from once and in its order, whatever was killed when, and the held-out accuracy is what it is
without kills. Not part of the suite; it has not been run to its end yet.
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
from grpo import models
from grpo.prompts import Prompts
from grpo.stages._run import load_problems, mixture


def rows(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async", dest="staleness", action="store_const", const=1, default=0)
    parser.add_argument("--model", default="runs/quickstart/sft/final")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    chance, killed = random.Random(options.seed), Counter[str]()
    subprocess.run(["rm", "-rf", str(options.folder)], check=True)
    overrides = [
        f"run_dir={options.folder}", f"model.path={options.model}", "model.warm_start=", "checkpoint.every=1", "eval.every=10",
        f"train.rollouts={options.rollouts}", f"train.max_staleness={options.staleness}",
        f"engine.servers={{count: 2, restarts: {options.kills + 1}}}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "grpo", "train", "configs/tiny.yaml", *overrides]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None or sum(killed.values()) < options.kills:
        if process.poll() is not None:
            if json.loads((options.folder / "manifest.json").read_text())["status"] == "finished":
                break
            process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(2, 40))
        try:
            family = psutil.Process(process.pid).children(recursive=True)
            servers = [member for member in family if "api_server" in " ".join(member.cmdline())]
            cores = [member for member in family if "EngineCore" in member.name() or "VLLM" in member.name()]
        except psutil.Error:
            continue
        if sum(killed.values()) >= options.kills:
            continue
        what = chance.choice(["server", "core", "trainer"])
        victims = {"server": servers, "core": cores, "trainer": [psutil.Process(process.pid)]}[what]
        if victims:
            chance.choice(victims).kill()
            killed[what] += 1
            print(f"{time.monotonic() - began:6.0f} s, step {len(rows(options.folder)) - 1}: killed a {what}", flush=True)
            if what == "trainer":
                process.wait()
    found = rows(options.folder)
    config = configs.load("configs/tiny.yaml", overrides)
    model_dir = Path(options.model)
    prompts = Prompts(config.prompt, models.load_tokenizer(model_dir), models.eos_token_ids(model_dir))
    stream = mixture(config.data, load_problems(config.data, "train", config.seed), prompts, config.seed)
    used = [
        json.loads(line)["problem"]
        for file in sorted((options.folder / "samples").glob("step-*.jsonl"))
        for line in file.read_text().splitlines()[:: config.train.group_size]
    ]
    wanted = [problem.id for problem in stream.take(0, len(used))]
    print(f"{dict(killed)} killed in {time.monotonic() - began:.0f} s; {len(found) - 1} of {options.rollouts} steps, each once: "
          f"{[row['rollout'] for row in found] == list(range(options.rollouts + 1))}; {len(used)} groups used, in order and once: "
          f"{used == wanted}; held out {[row['eval/accuracy'] for row in found if 'eval/accuracy' in row]}")  # fmt: skip
    left = [member for member in psutil.process_iter(["cmdline"]) if str(options.folder) in " ".join(member.info["cmdline"] or ())]
    print(f"processes left: {len([member for member in left if member.pid != psutil.Process().pid])}")


if __name__ == "__main__":
    main()
