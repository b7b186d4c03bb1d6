"""An update of SmolLM2-135M, 8 problems x 8 completions of 64 tokens with prompts of 100.

The packed stream beside the padded batch.

    .venv/bin/python tests/benchmarks/packing.py [--rounds 2] [--problems 8]

Both learners live in one process and take turns; each first update warms up and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from grpo import config as configs
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.types import Sample


def samples(problems: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)

    def tokens(n):
        return tuple(torch.randint(10, 49_000, (n,), generator=draw).tolist())

    rows = []
    for group in range(problems):
        prompt = tokens(100)
        for i in range(8):
            advantages = (1.0 if i % 2 else -1.0,) * 64
            rows.append(
                Sample(
                    token_ids=prompt + tokens(64),
                    prompt_length=100,
                    advantages=advantages,
                    sampler_logprobs=(-9.0,) * 64,
                    group=group,
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--problems", type=int, default=8)
    options = parser.parse_args()
    rows = samples(options.problems)
    weights = token_weights(rows, "sequence", 64)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = models.resolve(models.SMOLLM2, None, Path(scratch), 0)
        learners, batches = {}, {}
        for attention in ("packed", "sdpa"):
            tree = {
                "run_dir": scratch,
                "model": {"path": str(model_dir), "attention": attention},
                "data": {"name": "arithmetic"},
            }
            config = configs.parse(
                tree
                | {
                    "algorithm": {"kl_coef": 0.0},
                    "train": {"rollouts": 1},
                    "learner": {"micro_batch_tokens": 4096},
                }
            )
            learners[attention] = Learner(models.load_model(model_dir, attention), config, loss)
            batches[attention] = micro_batches(
                rows, weights, max_tokens=4096, packed=attention == "packed"
            )
        seconds: dict[str, list[float]] = {attention: [] for attention in learners}
        for number in range(options.rounds + 1):
            for attention, learner in learners.items():
                start = time.monotonic()
                learner.update(batches[attention])
                if number:
                    seconds[attention].append(time.monotonic() - start)
                print(f"{attention:8}{time.monotonic() - start:8.1f} s", flush=True)
    packed, padded = (statistics.median(seconds[attention]) for attention in ("packed", "sdpa"))
    print(f"packed {packed:.1f} s, padded {padded:.1f} s: {padded / packed:.2f} times as fast")


if __name__ == "__main__":
    main()
