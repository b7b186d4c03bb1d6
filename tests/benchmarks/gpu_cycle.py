"""Times training steps of a 1.5B model on one GPU: 8 problems x 8 completions of 256 tokens.

    .venv/bin/python tests/benchmarks/gpu_cycle.py [--trl] [--small] [key=value ...]

The model has the shape of Qwen2.5-1.5B, random weights and a byte tokenizer. Prints the table of
`grpo bench`: seconds per phase (medians over 10 rollouts after a warm-up) next to the lower bounds
of the machine. Figures in docs/benchmarks.md, "On a GPU". Published for TRL with colocated vLLM on
an H100: 2.27 s per cycle, of which the weight sync takes 0.18 s.

    --trl      then also times TRL's GRPOTrainer with vLLM, in a separate process
    --small    a tiny model and 16 tokens, to test this script on any machine
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
SMALL_SHAPE = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
}
MAX_TOKENS = 256
SMALL_MAX_TOKENS = 16
PROBLEMS = 8
GROUP_SIZE = 8
ROLLOUTS = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def varied(completion, problem):  # type: ignore[no-untyped-def]
    """A reward that differs within a group, so that every group has a training signal."""
    return float(completion.token_ids[0] % 2)


def varied_for_trl(completions, completion_ids, **_):  # type: ignore[no-untyped-def]
    """The reward `varied` with the signature that TRL expects."""
    return [float(token_ids[0] % 2) for token_ids in completion_ids]


def write_model(target: Path, *, small: bool) -> None:
    """Writes the model with random weights, and its tokenizer, to `target`."""
    shape = SMALL_SHAPE if small else SHAPE
    with torch.device(DEVICE):  # a CPU needs half a minute to draw 1.5B random numbers
        models.make_tiny("tiny-qwen2", target, 0, **shape)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def time_grpo(model_dir: Path, folder: Path, max_tokens: int, overrides: list[str]) -> None:
    """Prints the table of `grpo bench`."""
    # 64 sequences of 384 tokens occupy 0.7 GB.
    engine = {"kv_cache_gb": 4.0 if DEVICE == "cuda" else 0.2, "max_sequences": 64}
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model_dir), "dtype": "bfloat16"},
        "data": {"name": "arithmetic", "options": {"digits": 3}},
        "prompt": {"template": "plain", "max_tokens": 128},
        "sampling": {"max_tokens": max_tokens, "ignore_eos": True},
        "algorithm": {"kl_coef": 0.0},
        "rewards": {"gpu_cycle:varied": 1.0},
        "train": {"rollouts": ROLLOUTS, "problems": PROBLEMS, "group_size": GROUP_SIZE},
        "learner": {"micro_batch_tokens": 20_480},  # one micro-batch: 64 x 256 tokens and 8 prompts
        "engine": engine,
        "logging": {"progress": "line"},
    }
    bench(configs.parse(configs.apply_overrides(tree, overrides)), resume=False)


def time_trl(model_dir: Path, folder: Path, max_tokens: int) -> None:
    """Prints the seconds of each step of TRL's GRPOTrainer and their median.

    TRL's defaults, except that gradient checkpointing is off, as in grpo. vLLM is used on a GPU.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):  # type: ignore[no-untyped-def]
            self.start = time.monotonic()

        def on_step_end(self, *_, **__):  # type: ignore[no-untyped-def]
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.start)
            print(f"TRL step {len(seconds)}: {seconds[-1]:.2f} s", flush=True)

    has_gpu = DEVICE == "cuda"
    generation = {"ignore_eos": True} if has_gpu else {"min_new_tokens": max_tokens}
    arguments = GRPOConfig(
        output_dir=str(folder),
        bf16=True,
        use_cpu=not has_gpu,
        model_init_kwargs={"dtype": torch.bfloat16},
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=PROBLEMS * GROUP_SIZE,
        max_completion_length=max_tokens,
        generation_kwargs=generation,
        max_steps=ROLLOUTS + 1,
        learning_rate=1e-6,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        gradient_checkpointing=False,
        use_vllm=has_gpu,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
    )
    questions = [
        f"What is {100 + 7 * i} + {200 + 11 * i}?\n" for i in range(PROBLEMS * (ROLLOUTS + 1))
    ]
    dataset = Dataset.from_list([{"prompt": question} for question in questions])
    trainer = GRPOTrainer(
        model=str(model_dir),
        reward_funcs=varied_for_trl,
        args=arguments,
        train_dataset=dataset,
        callbacks=[StepTimer()],
    )
    trainer.train()
    measured = seconds[1:]
    print(
        f"TRL: {statistics.median(measured):.2f} s per step, median of {len(measured)} steps after "
        "a warm-up"
    )


def run_parts(options: argparse.Namespace) -> None:
    """Writes the model and runs each trainer in a separate process."""
    if DEVICE == "cuda":
        print(torch.cuda.get_device_name(), flush=True)
    else:
        print("no GPU: do not quote these numbers", flush=True)
    parts = ["ours", "trl"] if options.trl else ["ours"]
    small_flag = ["--small"] if options.small else []
    with tempfile.TemporaryDirectory(prefix="grpo-cycle-") as folder:
        write_model(Path(folder, "model"), small=options.small)
        for part in parts:
            arguments = [*options.overrides, *small_flag, "--part", part, "--folder", folder]
            subprocess.run(
                [sys.executable, __file__, *arguments],
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                check=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--small", action="store_true")
    # For the processes that this script starts: the trainer, and the folder with the model.
    parser.add_argument("--part", choices=["ours", "trl"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    max_tokens = SMALL_MAX_TOKENS if options.small else MAX_TOKENS
    if options.part == "ours":
        time_grpo(options.folder / "model", options.folder, max_tokens, options.overrides)
    elif options.part == "trl":
        time_trl(options.folder / "model", options.folder / "trl", max_tokens)
    else:
        run_parts(options)


if __name__ == "__main__":
    main()
