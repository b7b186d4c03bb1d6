r"""Compares `grpo eval` with plain transformers on GSM8K: verdicts, accuracy and texts.

    .venv/bin/python tests/benchmarks/eval_agreement.py --data FOLDER \
        [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--problems 200]

FOLDER contains the data set. Both sides use the same model, the same prompts (the first test
problems) and greedy decoding; only the engine differs. The answer is the last number of a
completion, as in lm-eval's flexible-extract, because this model uses neither boxes nor tags.

Prints the accuracy of each side with its 95 % interval, the number of equal verdicts, and the
number of identical texts. Figures in docs/benchmarks.md, "Servers and asynchronous rollouts".
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo.learning import models
from grpo.metrics import statistics
from grpo.rewards.accuracy import verify

BATCH_SIZE = 32
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")  # flexible-extract's expression


def sample_with_grpo(options: argparse.Namespace, scratch: Path) -> list[dict]:
    """Returns the rows that `grpo eval` writes, with question, answer and completion."""
    run_dir = scratch / "run"
    overrides = [
        f"run_dir={run_dir}",
        f"model.path={options.model}",
        "model.warm_start=",
        f"data.path={options.data}",
        "eval.protocol=greedy",
        f"eval.problems={options.problems}",
        f"model.dtype={options.dtype}",
        "rewards={accuracy: 1.0}",
        "prompt={template: chat, max_tokens: 512}",
        f"sampling.max_tokens={options.tokens}",
    ]
    subprocess.run(
        [sys.executable, "-m", "grpo", "eval", "configs/gsm8k_smollm2.yaml", *overrides],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    samples_file = next((run_dir / "samples").glob("eval-*.jsonl"))
    return [json.loads(line) for line in samples_file.read_text().splitlines()]


def sample_with_transformers(
    options: argparse.Namespace, scratch: Path, questions: list[str]
) -> list[str]:
    """Returns one completion per question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = models.resolve(options.model, None, scratch / "model", 0)
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    eos_token_ids = [tokenizer.eos_token_id, *models.eos_token_ids(model_dir)]
    completions: list[str] = []
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        chats = [[{"role": "user", "content": question}] for question in batch]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            outputs = model.generate(
                **inputs,
                max_new_tokens=options.tokens,
                do_sample=False,
                eos_token_id=eos_token_ids,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        prompt_length = inputs["input_ids"].shape[1]
        completions += tokenizer.batch_decode(outputs[:, prompt_length:], skip_special_tokens=True)
        print(f"transformers {len(completions)}/{len(questions)}", file=sys.stderr)
    return completions


def is_correct(completion: str, gold: str) -> bool:
    """Returns whether the last number of a completion equals the gold answer."""
    numbers = NUMBER.findall(completion)
    if not numbers:
        return False
    return verify(numbers[-1].rstrip("."), gold).value == "correct"


def print_accuracy(name: str, verdicts: list[bool]) -> None:
    low, high = statistics.bootstrap_interval([float(verdict) for verdict in verdicts])
    accuracy = sum(verdicts) / len(verdicts)
    print(f"{name:14} {accuracy:6.1%}  [{low:.1%}, {high:.1%}] of {len(verdicts)} problems")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = sample_with_grpo(options, Path(scratch))
        questions = [row["question"] for row in rows]
        transformers_texts = sample_with_transformers(options, Path(scratch), questions)
    grpo_verdicts = [is_correct(row["completion"], row["answer"]) for row in rows]
    transformers_verdicts = []
    num_equal_verdicts = 0
    num_identical_texts = 0
    for row, text, grpo_verdict in zip(rows, transformers_texts, grpo_verdicts, strict=True):
        transformers_verdict = is_correct(text, row["answer"])
        transformers_verdicts.append(transformers_verdict)
        if transformers_verdict == grpo_verdict:
            num_equal_verdicts += 1
        if text.strip() == row["completion"].strip():
            num_identical_texts += 1
    print_accuracy("grpo eval", grpo_verdicts)
    print_accuracy("transformers", transformers_verdicts)
    print(f"equal verdicts {num_equal_verdicts}, identical texts {num_identical_texts}")


if __name__ == "__main__":
    main()
