r"""Compares asynchronous with synchronous rollouts, and one server with the child process.

    .venv/bin/python tests/benchmarks/async_rollouts.py --part async \
        [--model runs/quickstart/sft/final] [--rollouts 8]
    .venv/bin/python tests/benchmarks/async_rollouts.py --part http \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --problems 8 --tokens 64

Without `--part` both parts run. Figures in docs/benchmarks.md, "Servers and asynchronous rollouts".

Part `async` trains twice with the learner on core 0 and one server on core 1: with synchronous
rollouts, and with `train.max_staleness: 1`. Each figure is a median over the steps after the
second. An ideal asynchronous step takes as long as the longer phase (rollout or update) of a
synchronous step. `--tokens` is the length of every completion. Choose it and `--epochs` so that
both phases take about the same time. The documented figures use the quickstart's model after its
cold start.

Part `http` only samples. The same requests go alternately to a child process and to one server,
each of which may use all cores. Each pair of measurements gives a ratio of the two times. Their
median and quartiles are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grpo import config as configs
from grpo.engines import Request, SamplingOptions
from grpo.engines.local.engine import VllmEngine
from grpo.engines.servers.pool import ServerPool
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models

GROUP_SIZE = 8
LEARNER_CORE = 0
SERVER_CORE = 1
WARM_UP_STEPS = 2
WARM_UP_ROUNDS = 2
PROMPT_TOKENS = 50
MAX_PROMPT_TOKENS = 64
MIN_TOKEN_ID = 100  # excludes the special tokens, which have small ids


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
        compare_asynchronous(options)
    if options.part in (None, "http"):
        compare_over_http(options)


def compare_asynchronous(options: argparse.Namespace) -> None:
    """Trains with synchronous and with asynchronous rollouts and prints the times of a step."""
    synchronous_rows = train("sync", options, [])
    asynchronous_rows = train("async", options, ["train.max_staleness=1"])

    rollout_s = median(synchronous_rows, "time/rollout_s")
    update_s = median(synchronous_rows, "time/update_s")
    synchronous_s = median(synchronous_rows, "time/total_s")
    other_s = synchronous_s - rollout_s - update_s
    print(
        f"synchronous: {synchronous_s:.2f} s per step: rollout {rollout_s:.2f} s, update "
        f"{update_s:.2f} s, other {other_s:.2f} s"
    )

    asynchronous_s = median(asynchronous_rows, "time/total_s")
    ideal_s = max(rollout_s, update_s)
    print(
        f"asynchronous: {asynchronous_s:.2f} s per step; ideal {ideal_s:.2f} s: "
        f"{ideal_s / asynchronous_s:.0%} of the ideal rate"
    )
    staleness = median(asynchronous_rows, "staleness/mean")
    engine_idle = median(asynchronous_rows, "idle/engine")
    learner_idle = median(asynchronous_rows, "idle/learner")
    print(
        f"mean staleness {staleness:.2f}; idle: engine {engine_idle:.0%}, learner "
        f"{learner_idle:.0%}"
    )


def train(
    name: str, options: argparse.Namespace, additional_overrides: list[str]
) -> list[dict[str, float]]:
    """Trains in a separate process and returns the rows of metrics after the warm-up steps."""
    run_dir = options.folder / name
    shutil.rmtree(run_dir, ignore_errors=True)
    train_section = {
        "rollouts": options.rollouts,
        "problems": options.problems,
        "group_size": GROUP_SIZE,
        "epochs": options.epochs,
    }
    overrides = [
        f"run_dir={run_dir}",
        f"train={json.dumps(train_section)}",
        f"model.path={options.model}",
        "model.warm_start=",
        f"seed={options.seed}",
        f"sampling={{max_tokens: {options.tokens}, ignore_eos: true}}",
        "rewards={accuracy: 1.0, format: 0.1}",
        "eval.every=0",
        "checkpoint={every: 0, keep_best: null}",
        "logging.progress=off",
        f"engine.servers={{count: 1, cores: [{SERVER_CORE}]}}",
        *additional_overrides,
        "learner.threads=1",
    ]
    command = [sys.executable, "-m", "grpo", "train", "configs/tiny.yaml", *overrides]
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {LEARNER_CORE}))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[1 + WARM_UP_STEPS :]  # the first row describes the start of the run


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def compare_over_http(options: argparse.Namespace) -> None:
    """Samples equal requests with both engines alternately and prints the ratios of the times."""
    generator = random.Random(options.seed)
    folder = options.folder / "http"
    model_dir = models.locate(configs.ModelSettings(path=options.model), folder, options.seed)
    tokenizer = models.load_tokenizer(model_dir)
    model = ServedModel(
        model_dir=str(model_dir),
        dtype="bfloat16",
        max_model_len=MAX_PROMPT_TOKENS + options.tokens,
        load_weights=True,
    )
    engines = start_engines(model, folder, tokenizer.decode)
    sampling = SamplingOptions(max_tokens=options.tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {"child": [], "pool": []}
    try:
        for engine in engines.values():
            engine.wait_ready()
        for round_index in range(WARM_UP_ROUNDS + options.rollouts):
            requests = random_requests(generator, round_index, options.problems, len(tokenizer))
            order = ("child", "pool") if round_index % 2 else ("pool", "child")
            for name in order:
                start = time.monotonic()
                engines[name].generate(requests, sampling)
                seconds[name].append(time.monotonic() - start)
    finally:
        for engine in engines.values():
            engine.close()
    print_ratios(seconds["child"][WARM_UP_ROUNDS:], seconds["pool"][WARM_UP_ROUNDS:])


def start_engines(
    model: ServedModel, folder: Path, decode: Callable[..., str]
) -> dict[str, VllmEngine | ServerPool]:
    """Starts a child process and a pool of one server, without waiting until they are ready."""
    settings = configs.EngineSettings(kv_cache_gb=0.5, max_sequences=64)
    pool_settings = settings.model_copy(update={"servers": configs.ServerSettings(count=1)})
    return {
        "child": VllmEngine(model=model, settings=settings, log_file=folder / "engine.log"),
        "pool": ServerPool(model=model, settings=pool_settings, run_dir=folder, decode=decode),
    }


def random_requests(
    generator: random.Random, round_index: int, num_problems: int, vocab_size: int
) -> list[Request]:
    """Returns one request per problem, each for GROUP_SIZE completions of a random prompt."""
    requests = []
    for problem_index in range(num_problems):
        prompt = tuple(generator.randrange(MIN_TOKEN_ID, vocab_size) for _ in range(PROMPT_TOKENS))
        seed = 1000 * round_index + GROUP_SIZE * problem_index
        requests.append(Request(prompt_ids=prompt, seed=seed, n=GROUP_SIZE))
    return requests


def print_ratios(child_seconds: list[float], pool_seconds: list[float]) -> None:
    ratios = [pool / child for child, pool in zip(child_seconds, pool_seconds, strict=True)]
    quartiles = statistics.quantiles(ratios)
    print(
        f"rollout on all cores: child process {statistics.median(child_seconds):.2f} s, one server "
        f"over HTTP {statistics.median(pool_seconds):.2f} s; difference over {len(ratios)} pairs: "
        f"median {statistics.median(ratios) - 1:+.1%}, middle half {quartiles[0] - 1:+.1%} to "
        f"{quartiles[2] - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
