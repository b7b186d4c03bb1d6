"""One GRPO cycle of a 1.5B-shaped model on one GPU.

8 problems x 8 completions of 256 tokens, a phase table beside its bounds.

    .venv/bin/python tests/benchmarks/gpu_cycle.py [--trl] [--small] [key=value ...]

Random weights in Qwen2.5-1.5B's shape, a byte tokenizer. `--trl`: then the same cycle by TRL's
GRPOTrainer with vLLM in its own process. `--small` tries the script itself, anywhere. Published for
TRL so on an H100: 2.27 s a cycle, of which 0.18 s are the sync.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from grpo import config as configs
from grpo.learning import models
from grpo.tools.bench import bench

SHAPE = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "dtype": "bfloat16",
}
SMALL = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
}
PROBLEMS, GROUP_SIZE = 8, 8
ROLLOUTS = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def varied(completion, problem):  # type: ignore[no-untyped-def]
    """Groups must differ in their rewards, or there is nothing to update."""
    return float(completion.token_ids[0] % 2)


def varied_for_trl(completions, completion_ids, **_):  # type: ignore[no-untyped-def]
    return [float(token_ids[0] % 2) for token_ids in completion_ids]


def write_model(target: Path, *, small: bool) -> None:
    with torch.device(DEVICE):  # random numbers for 1.5B weights take a CPU half a minute
        models.make_tiny("tiny-qwen2", target, 0, **(SMALL if small else SHAPE))
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def ours(model_dir: Path, folder: Path, tokens: int, overrides: list[str]) -> None:
    """Prints the phase table."""
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model_dir), "dtype": "bfloat16"},
        "data": {"name": "arithmetic", "options": {"digits": 3}},
        "prompt": {"template": "plain", "max_tokens": 128},
        "sampling": {"max_tokens": tokens, "ignore_eos": True},
        "algorithm": {"kl_coef": 0.0},
        "rewards": {"gpu_cycle:varied": 1.0},
        "train": {"rollouts": ROLLOUTS, "problems": PROBLEMS, "group_size": GROUP_SIZE},
        "learner": {"micro_batch_tokens": 20_480},  # one micro-batch: 64 x 256 tokens and 8 prompts
        "engine": {"kv_cache_gb": 0.2, "memory_fraction": 0.3, "max_sequences": 64},
        "logging": {"progress": "line"},
    }
    bench(configs.parse(configs.apply_overrides(tree, overrides)), resume=False)


def trl(model_dir: Path, folder: Path, tokens: int) -> None:
    """Prints the seconds of TRL's cycles.

    Its defaults, but without gradient checkpointing, as ours; vLLM wherever there is a GPU.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):  # type: ignore[no-untyped-def]
            self.start = time.monotonic()

        def on_step_end(self, *_, **__):  # type: ignore[no-untyped-def]
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.start)
            print(f"TRL cycle {len(seconds)}: {seconds[-1]:.2f} s", flush=True)

    gpu = DEVICE == "cuda"
    generation = {"ignore_eos": True} if gpu else {"min_new_tokens": tokens}
    arguments = GRPOConfig(
        output_dir=str(folder),
        bf16=True,
        use_cpu=not gpu,
        model_init_kwargs={"dtype": torch.bfloat16},
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=PROBLEMS * GROUP_SIZE,
        max_completion_length=tokens,
        generation_kwargs=generation,
        max_steps=ROLLOUTS + 1,
        learning_rate=1e-6,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        gradient_checkpointing=False,
        use_vllm=gpu,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
    )
    questions = [
        f"What is {100 + 7 * i} + {200 + 11 * i}?\n" for i in range(PROBLEMS * (ROLLOUTS + 1))
    ]
    dataset = Dataset.from_list([{"prompt": question} for question in questions])
    GRPOTrainer(
        model=str(model_dir),
        reward_funcs=varied_for_trl,
        args=arguments,
        train_dataset=dataset,
        callbacks=[Clock()],
    ).train()
    print(
        f"TRL: {statistics.median(seconds[1:]):.2f} s a cycle, median of {len(seconds) - 1} after "
        "a warm-up"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--small", action="store_true")
    # what a process of its own is started for, with the folder of the model
    parser.add_argument("--part", choices=["ours", "trl"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    tokens = 16 if options.small else 256
    if options.part == "ours":
        ours(options.folder / "model", options.folder, tokens, options.overrides)
    elif options.part == "trl":
        trl(options.folder / "model", options.folder / "trl", tokens)
    else:
        print(
            torch.cuda.get_device_name()
            if DEVICE == "cuda"
            else "no GPU: these are not the numbers to quote",
            flush=True,
        )
        with tempfile.TemporaryDirectory(prefix="grpo-cycle-") as folder:
            write_model(Path(folder, "model"), small=options.small)
            small = ["--small"] if options.small else []
            for part in ["ours", "trl"] if options.trl else ["ours"]:
                command = [
                    sys.executable,
                    __file__,
                    *options.overrides,
                    *small,
                    "--part",
                    part,
                    "--folder",
                    folder,
                ]
                subprocess.run(
                    command, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, check=True
                )


if __name__ == "__main__":
    main()
