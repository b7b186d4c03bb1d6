"""A whole cycle (rollout, reward, update, sync) beside TRL's GRPOTrainer.

SmolLM2-135M in bf16, 8 prompts of 100 tokens x 8 x 64.

    python tests/benchmarks/trl_cycle.py [CYCLES]

The two run in processes of their own and take turns, so that a slow minute of the machine hits
both; each cycle's seconds and the ratio of the medians are printed. TRL generates with transformers
(its vLLM mode needs a GPU), everything else is its default.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, GROUP, PROMPT_TOKENS, TOKENS = 8, 8, 100, 64
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SENTENCE = (
    "the sum of all numbers in a row is more than one half of what we have seen before this day"
)


def prompt_texts(model_dir: Path) -> list[str]:
    """Prompts of exactly PROMPT_TOKENS tokens, the last one a line end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    words = SENTENCE.split()
    texts = []
    for i in range(PROMPTS):
        text = " ".join([*words[i:], *words] * 9)
        ids = tokenizer(text)["input_ids"][: PROMPT_TOKENS - 1]
        texts.append(tokenizer.decode(ids) + "\n")
        assert len(tokenizer(texts[-1])["input_ids"]) == PROMPT_TOKENS
    return texts


def digits(text: str) -> float:
    return sum(character.isdigit() or character in "aeiou" for character in text) / max(
        1, len(text)
    )


def digits_reward(completion, problem):  # ours
    return digits(completion.text)


def digits_rewards(completions, **_):  # TRL's form
    return [digits(text) for text in completions]


def ours(turn, model_dir: Path, folder: Path) -> None:
    import json
    import os

    from grpo import config as configs
    from grpo.stages.train import train
    from grpo.training.loop import Loop

    data = folder / "prompts.jsonl"
    texts = prompt_texts(model_dir)
    data.write_text(
        "".join(json.dumps({"problem": text.rstrip("\n"), "answer": "0"}) + "\n" for text in texts)
    )
    os.chdir(Path(__file__).parent)
    config = configs.parse(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model_dir)},
            "data": {"name": "jsonl", "path": str(data)},
            "prompt": {"template": "plain", "max_tokens": PROMPT_TOKENS},
            "sampling": {"max_tokens": TOKENS, "ignore_eos": True},
            "rewards": {"trl_cycle:digits_reward": 1.0},
            "algorithm": {"kl_coef": 0.0},
            "train": {"rollouts": 1000, "problems": PROMPTS, "group_size": GROUP},
            "learner": {"lr": 1e-6, "micro_batch_tokens": 2048},
            "engine": {"kv_cache_gb": 1.0},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "logging": {"progress": "off"},
        }
    )
    step = Loop.step

    def in_turn(self):
        turn.recv()
        start = time.monotonic()
        step(self)
        row = self.journal.latest
        turn.send(
            (
                time.monotonic() - start,
                {
                    key: round(row[f"time/{key}_s"], 2)
                    for key in ("rollout", "update", "sync", "probe")
                },
            )
        )

    Loop.step = in_turn
    train(config, resume=False, keep=False)


def trl(turn, model_dir: Path, folder: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.recv()
            self.start = time.monotonic()

        def on_step_end(self, *_, **__):
            turn.send((time.monotonic() - self.start, {}))

    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": torch.bfloat16},
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        max_steps=1000,
        learning_rate=1e-6,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
    )
    dataset = Dataset.from_list([{"prompt": text} for text in prompt_texts(model_dir)])
    GRPOTrainer(
        model=str(model_dir),
        reward_funcs=digits_rewards,
        args=arguments,
        train_dataset=dataset,
        callbacks=[Turns()],
    ).train()


def main(cycles: int) -> None:
    from grpo.learning import models

    model_dir = models.resolve(MODEL, None, Path("unused"), 0)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        turns, workers = {}, []
        for work in (ours, trl):
            turns[work.__name__], theirs = context.Pipe()
            folder = Path(scratch, work.__name__)
            folder.mkdir()
            workers.append(context.Process(target=work, args=(theirs, model_dir, folder)))
            workers[-1].start()
        seconds = {name: [] for name in turns}
        for cycle in range(cycles + 1):  # the first warms up
            for name, turn in turns.items():
                turn.send(None)
                taken, parts = turn.recv()
                print(
                    f"{'warm-up' if not cycle else f'cycle {cycle}':8} {name:5} {taken:6.1f} s  "
                    f"{parts or ''}",
                    flush=True,
                )
                if cycle:
                    seconds[name].append(taken)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(
            f"median: ours {medians['ours']:.1f} s, TRL {medians['trl']:.1f} s, ratio "
            f"{medians['ours'] / medians['trl']:.2f}"
        )
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
