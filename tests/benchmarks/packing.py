"""Times an update of SmolLM2-135M with a packed stream and with padded batches.

    .venv/bin/python tests/benchmarks/packing.py [--rounds 2] [--problems 8]

An update has 8 problems x 8 completions of 64 tokens with prompts of 100 tokens, in micro-batches
of 4,096 tokens. In a packed stream the tokens of a prompt occur once per group. Both learners run
in one process and update alternately. The first update of each is a warm-up; the result is the
ratio of the medians of the others. Figures in docs/benchmarks.md, first table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from grpo import config as configs
from grpo.learning import hub, models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.types import Sample

GROUP_SIZE = 8
PROMPT_TOKENS = 100
COMPLETION_TOKENS = 64
MICRO_BATCH_TOKENS = 4096


def random_samples(num_problems: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 49_000, (count,), generator=generator).tolist())

    samples = []
    for group in range(num_problems):
        prompt = random_tokens(PROMPT_TOKENS)
        for i in range(GROUP_SIZE):
            advantage = 1.0 if i % 2 else -1.0
            samples.append(
                Sample(
                    token_ids=prompt + random_tokens(COMPLETION_TOKENS),
                    prompt_length=PROMPT_TOKENS,
                    advantages=(advantage,) * COMPLETION_TOKENS,
                    sampler_logprobs=(-9.0,) * COMPLETION_TOKENS,
                    group=group,
                )
            )
    return samples


def make_learner(model_dir: Path, run_dir: str, attention: str) -> Learner:
    tree = {
        "run_dir": run_dir,
        "model": {"path": str(model_dir), "attention": attention},
        "data": {"name": "arithmetic"},
        "algorithm": {"kl_coef": 0.0},
        "train": {"rollouts": 1},
        "learner": {"micro_batch_tokens": MICRO_BATCH_TOKENS},
    }
    return Learner(models.load_model(model_dir, attention), configs.parse(tree), loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--problems", type=int, default=8)
    options = parser.parse_args()
    samples = random_samples(options.problems)
    weights = token_weights(samples, "sequence", COMPLETION_TOKENS)
    learners = {}
    batches = {}
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = models.resolve(hub.SMOLLM2, None, Path(scratch), 0)
        for attention in ("packed", "sdpa"):
            learners[attention] = make_learner(model_dir, scratch, attention)
            batches[attention] = micro_batches(
                samples, weights, max_tokens=MICRO_BATCH_TOKENS, packed=attention == "packed"
            )
        seconds: dict[str, list[float]] = {attention: [] for attention in learners}
        for _ in range(1 + options.rounds):
            for attention, learner in learners.items():
                start = time.monotonic()
                learner.update(batches[attention])
                seconds[attention].append(time.monotonic() - start)
                print(f"{attention:8}{seconds[attention][-1]:8.1f} s", flush=True)
    packed_s = statistics.median(seconds["packed"][1:])
    padded_s = statistics.median(seconds["sdpa"][1:])
    print(
        f"packed {packed_s:.1f} s, padded {padded_s:.1f} s: {padded_s / packed_s:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
