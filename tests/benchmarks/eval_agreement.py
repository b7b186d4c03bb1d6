r"""`grpo eval` beside plain transformers.

The same model, prompts and greedy decoding on GSM8K's test problems.

    .venv/bin/python tests/benchmarks/eval_agreement.py --data FOLDER \
        [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--problems 200]

Judged is the last number of each text, as lm-eval's flexible-extract does (this model knows neither
box nor tags); what differs is the engine. Printed: accuracy of each with its interval, how many
problems are judged alike, how many texts are equal to the last character.
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
from rewards.accuracy import verify

BATCH = 32


def by_grpo(
    model: str, folder: Path, scratch: Path, *, problems: int, tokens: int, dtype: str
) -> list[dict]:
    overrides = [
        f"run_dir={scratch / 'run'}",
        f"model.path={model}",
        "model.warm_start=",
        f"data.path={folder}",
        "eval.protocol=greedy",
        f"eval.problems={problems}",
        f"model.dtype={dtype}",
        "rewards={accuracy: 1.0}",
        "prompt={template: chat, max_tokens: 512}",
        f"sampling.max_tokens={tokens}",
    ]
    subprocess.run(
        [sys.executable, "-m", "grpo", "eval", "configs/gsm8k_smollm2.yaml", *overrides],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    file = next((scratch / "run" / "samples").glob("eval-*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_transformers(model_dir: Path, questions: list[str], *, tokens: int, dtype: str) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    ends = [tokenizer.eos_token_id, *models.eos_token_ids(model_dir)]
    found = []
    for start in range(0, len(questions), BATCH):
        chats = [
            [{"role": "user", "content": question}] for question in questions[start : start + BATCH]
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=ends,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        found += tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(f"transformers {len(found)}/{len(questions)}", file=sys.stderr)
    return found


def right(text: str, gold: str) -> bool:
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return bool(numbers) and verify(numbers[-1].rstrip("."), gold).value == "correct"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = models.resolve(options.model, None, Path(scratch) / "model", 0)
        common = {"tokens": options.tokens, "dtype": options.dtype}
        rows = by_grpo(
            options.model, options.data, Path(scratch), problems=options.problems, **common
        )
        texts = by_transformers(model_dir, [row["question"] for row in rows], **common)
    ours = [right(row["completion"], row["answer"]) for row in rows]
    theirs = [right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
    for name, verdicts in (("grpo eval", ours), ("transformers", theirs)):
        low, high = statistics.bootstrap_interval([float(ok) for ok in verdicts])
        print(
            f"{name:14} {sum(verdicts) / len(verdicts):6.1%}  [{low:.1%}, {high:.1%}] of "
            f"{len(verdicts)} problems"
        )
    same = sum(
        row["completion"].strip() == text.strip() for row, text in zip(rows, texts, strict=True)
    )
    print(
        f"judged alike {sum(a == b for a, b in zip(ours, theirs, strict=True))}, equal text {same}"
    )


if __name__ == "__main__":
    main()
