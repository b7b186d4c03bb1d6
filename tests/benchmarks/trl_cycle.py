"""Compares the time of a training step (rollout, reward, update, sync) with TRL's GRPOTrainer.

    python tests/benchmarks/trl_cycle.py [CYCLES]

SmolLM2-135M in bfloat16, 8 prompts of 100 tokens x 8 completions of 64 tokens. Figures in
docs/benchmarks.md, first table.

Each trainer runs in its own process. They make steps alternately, so that a slow minute of the
machine affects both. Prints the seconds of every step (CYCLES after a warm-up, 3 by default) and
the ratio of the medians. TRL samples with transformers, because its vLLM mode needs a GPU; all of
its other settings are its defaults.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = 8
GROUP_SIZE = 8
PROMPT_TOKENS = 100
MAX_TOKENS = 64
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SENTENCE = (
    "the sum of all numbers in a row is more than one half of what we have seen before this day"
)
PHASES = ("rollout", "update", "sync", "probe")


def prompt_texts(model_dir: Path) -> list[str]:
    """Returns prompts of exactly PROMPT_TOKENS tokens. The last token is a line end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    words = SENTENCE.split()
    texts = []
    for i in range(PROMPTS):
        long_text = " ".join([*words[i:], *words] * 9)
        ids = tokenizer(long_text)["input_ids"][: PROMPT_TOKENS - 1]
        texts.append(tokenizer.decode(ids) + "\n")
        assert len(tokenizer(texts[-1])["input_ids"]) == PROMPT_TOKENS
    return texts


def share_of_digits_and_vowels(text: str) -> float:
    count = sum(character.isdigit() or character in "aeiou" for character in text)
    return count / max(1, len(text))


def digits_reward(completion, problem):
    """The reward with the signature that grpo expects."""
    return share_of_digits_and_vowels(completion.text)


def digits_rewards(completions, **_):
    """The reward with the signature that TRL expects."""
    return [share_of_digits_and_vowels(text) for text in completions]


def run_grpo(pipe, model_dir: Path, folder: Path) -> None:
    """Makes a step for every message in the pipe and sends its seconds and those of its phases."""
    from grpo import config as configs
    from grpo.stages.train import train
    from grpo.training.loop import Loop

    data_file = folder / "prompts.jsonl"
    with data_file.open("w") as file:
        for text in prompt_texts(model_dir):
            file.write(json.dumps({"problem": text.rstrip("\n"), "answer": "0"}) + "\n")
    os.chdir(Path(__file__).parent)  # the reward is imported from this file
    config = configs.parse(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model_dir)},
            "data": {"name": "jsonl", "path": str(data_file)},
            "prompt": {"template": "plain", "max_tokens": PROMPT_TOKENS},
            "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": True},
            "rewards": {"trl_cycle:digits_reward": 1.0},
            "algorithm": {"kl_coef": 0.0},
            "train": {"rollouts": 1000, "problems": PROMPTS, "group_size": GROUP_SIZE},
            "learner": {"lr": 1e-6, "micro_batch_tokens": 2048},
            "engine": {"kv_cache_gb": 1.0},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "logging": {"progress": "off"},
        }
    )
    make_step = Loop.step

    def step_on_request(self):
        pipe.recv()
        start = time.monotonic()
        make_step(self)
        seconds = time.monotonic() - start
        row = self.journal.latest_metrics
        pipe.send((seconds, {phase: round(row[f"time/{phase}_s"], 2) for phase in PHASES}))

    Loop.step = step_on_request
    train(config, resume=False, keep=False)


def run_trl(pipe, model_dir: Path, folder: Path) -> None:
    """Makes a step for every message in the pipe and sends its seconds."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class StepOnRequest(TrainerCallback):
        def on_step_begin(self, *_, **__):
            pipe.recv()
            self.start = time.monotonic()

        def on_step_end(self, *_, **__):
            pipe.send((time.monotonic() - self.start, {}))

    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": torch.bfloat16},
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        generation_kwargs={"min_new_tokens": MAX_TOKENS},
        max_steps=1000,
        learning_rate=1e-6,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
    )
    dataset = Dataset.from_list([{"prompt": text} for text in prompt_texts(model_dir)])
    trainer = GRPOTrainer(
        model=str(model_dir),
        reward_funcs=digits_rewards,
        args=arguments,
        train_dataset=dataset,
        callbacks=[StepOnRequest()],
    )
    trainer.train()


TRAINERS = {"grpo": run_grpo, "trl": run_trl}


def main(num_cycles: int) -> None:
    from grpo.learning import models

    model_dir = models.resolve(MODEL, None, Path("unused"), 0)
    context = multiprocessing.get_context("spawn")
    pipes = {}
    processes = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, run_trainer in TRAINERS.items():
            folder = Path(scratch, name)
            folder.mkdir()
            pipes[name], trainer_pipe = context.Pipe()
            process = context.Process(target=run_trainer, args=(trainer_pipe, model_dir, folder))
            process.start()
            processes.append(process)
        seconds = time_steps(pipes, num_cycles)
        grpo_s = statistics.median(seconds["grpo"])
        trl_s = statistics.median(seconds["trl"])
        print(f"median: grpo {grpo_s:.1f} s, TRL {trl_s:.1f} s, ratio {grpo_s / trl_s:.2f}")
        for process in processes:
            process.kill()


def time_steps(pipes: dict, num_cycles: int) -> dict[str, list[float]]:
    """Returns the seconds of each trainer's steps after the warm-up. Prints every step."""
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for cycle in range(num_cycles + 1):
        label = f"cycle {cycle}" if cycle else "warm-up"
        for name, pipe in pipes.items():
            pipe.send(None)
            step_s, phases = pipe.recv()
            print(f"{label:8} {name:5} {step_s:6.1f} s  {phases or ''}", flush=True)
            if cycle:
                seconds[name].append(step_s)
    return seconds


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
