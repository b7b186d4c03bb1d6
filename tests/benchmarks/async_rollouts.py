r"""Asynchronous against synchronous rollouts, engine on one core and learner on the other.

A pool of one server against the child.

    .venv/bin/python tests/benchmarks/async_rollouts.py \
        [--model runs/quickstart/sft/final] [--rollouts 8]
    .venv/bin/python tests/benchmarks/async_rollouts.py --part http \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --problems 8 --tokens 64

Ideal is the longer of a synchronous step's two phases; seconds are medians over the steps after the
second. The model is the quickstart's after its cold start, with completions of one length so that
the phases are balanced (--tokens, --epochs). The second part samples only, in turns, and quotes the
ratio of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from grpo import config as configs
from grpo.engines import Request, SamplingOptions
from grpo.engines.local.engine import VllmEngine
from grpo.engines.servers.pool import ServerPool
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models

KINDS = {
    "sync": ["engine.servers={count: 1, cores: [1]}"],
    "async": ["engine.servers={count: 1, cores: [1]}", "train.max_staleness=1"],
}


def run(
    name: str, folder: Path, options: argparse.Namespace, overrides: list[str], cores: set[int]
) -> list[dict[str, float]]:
    target = folder / name
    subprocess.run(["rm", "-rf", str(target)], check=True)
    train = {
        "rollouts": options.rollouts,
        "problems": options.problems,
        "group_size": 8,
        "epochs": options.epochs,
    }
    common = [
        f"run_dir={target}",
        f"train={json.dumps(train)}",
        f"model.path={options.model}",
        "model.warm_start=",
        f"seed={options.seed}",
        f"sampling={{max_tokens: {options.tokens}, ignore_eos: true}}",
        "rewards={accuracy: 1.0, format: 0.1}",
        "eval.every=0",
        "checkpoint={every: 0, keep_best: null}",
        "logging.progress=off",
    ]
    command = [sys.executable, "-m", "grpo", "train", "configs/tiny.yaml", *common, *overrides]
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    return [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()][3:]


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny-qwen2")
    parser.add_argument("--part", choices=["async", "http"], help="default: both")
    parser.add_argument("--folder", type=Path, default=Path("runs/async_bench"))
    options = parser.parse_args()
    if options.part in (None, "async"):
        asynchronous(options)
    if options.part in (None, "http"):
        over_http(options)


def asynchronous(options: argparse.Namespace) -> None:
    found = {
        name: run(name, options.folder, options, [*more, "learner.threads=1"], {0})
        for name, more in KINDS.items()
    }
    rollout, update = (median(found["sync"], f"time/{phase}_s") for phase in ("rollout", "update"))
    sync, other = median(found["sync"], "time/total_s"), median(found["async"], "time/total_s")
    print(
        f"synchronous: {sync:.2f} s a step: rollout {rollout:.2f}, update {update:.2f}, rest "
        f"{sync - rollout - update:.2f}"
    )
    print(
        f"asynchronous: {other:.2f} s a step; ideal {max(rollout, update):.2f} s: "
        f"{max(rollout, update) / other:.0%} of its rate"
    )
    stale, idle = (
        median(found["async"], "staleness/mean"),
        [median(found["async"], f"idle/{side}") for side in ("engine", "learner")],
    )
    print(f"staleness {stale:.2f} in the mean; idle: engine {idle[0]:.0%}, learner {idle[1]:.0%}")


def over_http(options: argparse.Namespace) -> None:
    """The same requests in turns by a child process and by a server, each with all cores.

    Whatever else the machine does falls on both.
    """
    chance, seconds = random.Random(options.seed), {"child": [], "pool": []}
    folder = options.folder / "http"
    model_dir = models.locate(configs.ModelSettings(path=options.model), folder, options.seed)
    tokenizer, settings = (
        models.load_tokenizer(model_dir),
        configs.EngineSettings(kv_cache_gb=0.5, max_sequences=64),
    )
    model = ServedModel(
        model_dir=str(model_dir),
        dtype="bfloat16",
        max_model_len=64 + options.tokens,
        load_weights=True,
    )
    served = settings.model_copy(update={"servers": configs.ServerSettings(count=1)})
    engines = {
        "child": VllmEngine(model=model, settings=settings, log_file=folder / "engine.log"),
        "pool": ServerPool(model=model, settings=served, run_dir=folder, decode=tokenizer.decode),
    }
    try:
        for engine in engines.values():
            engine.wait_ready()
        for i in range(options.rollouts + 2):
            prompts = [
                tuple(chance.randrange(100, len(tokenizer)) for _ in range(50))
                for _ in range(options.problems)
            ]
            requests = [
                Request(prompt_ids=prompt, seed=1000 * i + 8 * k, n=8)
                for k, prompt in enumerate(prompts)
            ]
            for name in ("child", "pool") if i % 2 else ("pool", "child"):
                start = time.monotonic()
                engines[name].generate(
                    requests, SamplingOptions(max_tokens=options.tokens, ignore_eos=True)
                )
                seconds[name].append(time.monotonic() - start)
    finally:
        for engine in engines.values():
            engine.close()
    ratios = [
        pool / child for child, pool in zip(seconds["child"][2:], seconds["pool"][2:], strict=True)
    ]
    child, pool = (statistics.median(found[2:]) for found in seconds.values())
    print(
        f"rollout on all cores: child process {child:.2f} s, one server over HTTP {pool:.2f} s; "
        f"of {len(ratios)} pairs the median is "
        f"{statistics.median(ratios) - 1:+.1%}, the middle half "
        f"{statistics.quantiles(ratios)[0] - 1:+.1%} to "
        f"{statistics.quantiles(ratios)[2] - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
