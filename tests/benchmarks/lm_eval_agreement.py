r"""Compares `grpo eval` with EleutherAI's lm-evaluation-harness, problem by problem.

    .venv/bin/python tests/benchmarks/lm_eval_agreement.py --problems FILE --lm-eval PYTHON \
        --model MODEL [--count 100] [--system TEXT] [--output FOLDER]

FILE has lines with `problem` and `answer`; `--problems sums` generates sums of three digits, the
task of the quickstart. MODEL is a hub id or a directory, such as RUN/final. PYTHON is the
interpreter of an environment with lm-eval, which may be another one than that of grpo. Both sides
use the same model directory, the first problems, the same chat prompts and greedy decoding. lm-eval
samples with transformers, grpo with vLLM. With --output, the rows of both sides are kept, and are
read again if they exist.

Prints how many prompts, completions, answers and verdicts are equal, and each problem on which the
verdicts differ. Figures in docs/lm_eval.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from grpo.config import PromptSettings
from grpo.data import arithmetic
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.metrics import statistics
from grpo.rewards.verifier.parse import final_answer
from grpo.types import Problem

TASK = "agreement"
# How lm-eval reads the answer. The first filter and the metric are those of lm-eval's own task
# gsm8k: the last number of a completion. The second reads the answer where grpo reads it: in the
# last box or the last answer tag.
FILTERS = {
    "flexible-extract": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
    "marked": r"(?:\\boxed\{|<answer>)\s*([^{}<]*[^{}<\s])",
}
METRIC = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "ignore_case": True,
    "ignore_punctuation": False,
    "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalRow:
    """The result of lm-eval on one problem."""

    prompt: str
    completion: str
    answers: dict[str, str]  # by filter
    is_correct: dict[str, bool]  # by filter


def write_problems(options: argparse.Namespace, folder: Path) -> Path:
    """Writes the first problems to problems.jsonl and returns the file."""
    if options.problems == "sums":
        sums = arithmetic.load("test", seed=0, digits=3)
        problems = [sums[index] for index in range(options.count)]
        rows = [{"problem": problem.question, "answer": problem.answer} for problem in problems]
    else:
        lines = Path(options.problems).read_text().splitlines()[: options.count]
        rows = [json.loads(line) for line in lines]
    file = folder / "problems.jsonl"
    with file.open("w") as stream:
        for row in rows:
            line = json.dumps({"problem": row["problem"], "answer": str(row["answer"])})
            stream.write(line + "\n")
    return file


def prompt_settings(options: argparse.Namespace) -> PromptSettings:
    return PromptSettings(template="chat", system=options.system)


def evaluate_with_grpo(
    options: argparse.Namespace, model_dir: Path, problems_file: Path
) -> list[dict]:
    """Returns the rows that `grpo eval` writes."""
    run_dir = problems_file.parent / "run"
    if not run_dir.exists():
        data = {
            "name": "jsonl",
            "path": str(problems_file),
            "options": {"test_path": str(problems_file)},
        }
        tree = {
            "run_dir": str(run_dir),
            "model": {"path": str(model_dir), "dtype": "float32"},
            "data": data,
            "prompt": prompt_settings(options).model_dump(),
            "sampling": {"max_tokens": options.tokens},
            "rewards": {"accuracy": 1.0},
            "eval": {"protocol": "greedy", "problems": options.count},
        }
        config = problems_file.parent / "eval.yaml"
        config.write_text(yaml.safe_dump(tree))
        subprocess.run([sys.executable, "-m", "grpo", "eval", str(config)], check=True)
    samples_file = next((run_dir / "samples").glob("eval-*.jsonl"))
    return [json.loads(line) for line in samples_file.read_text().splitlines()]


def evaluate_with_lm_eval(
    options: argparse.Namespace, model_dir: Path, problems_file: Path
) -> dict[str, LmEvalRow]:
    """Returns the results of lm-eval by question."""
    output = problems_file.parent / "lm_eval"
    if not output.exists():
        tasks = problems_file.parent / "tasks"
        tasks.mkdir(exist_ok=True)
        (tasks / f"{TASK}.yaml").write_text(yaml.safe_dump(task(options, problems_file)))
        command = [
            *(options.lm_eval, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={model_dir},dtype=float32"),
            *("--tasks", TASK, "--include_path", str(tasks), "--batch_size", "16"),
            *("--apply_chat_template", "--log_samples", "--output_path", str(output)),
            *("--use_cache", str(tasks / "cache")),  # an interrupted evaluation continues
        ]
        if options.system:
            command += ["--system_instruction", options.system]
        subprocess.run(command, check=True)
    (samples_file,) = output.rglob(f"samples_{TASK}_*.jsonl")
    rows: dict[str, LmEvalRow] = {}
    for line in samples_file.read_text().splitlines():
        sample = json.loads(line)
        row = rows.setdefault(
            sample["doc"]["problem"],
            LmEvalRow(
                prompt=sample["arguments"]["gen_args_0"]["arg_0"],
                completion=sample["resps"][0][0],
                answers={},
                is_correct={},
            ),
        )
        row.answers[sample["filter"]] = sample["filtered_resps"][0]
        row.is_correct[sample["filter"]] = sample["exact_match"] == 1
    return rows


def task(options: argparse.Namespace, problems_file: Path) -> dict:
    """Returns the task in lm-eval's form."""
    filters = []
    for name, pattern in FILTERS.items():
        regex = {"function": "regex", "group_select": -1, "regex_pattern": pattern}
        steps = [regex, {"function": "take_first"}]
        filters.append({"name": name, "filter": steps})
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems_file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": options.tokens,
        },
        "filter_list": filters,
        "metric_list": [METRIC],
    }


def print_accuracy(name: str, verdicts: list[bool]) -> None:
    low, high = statistics.bootstrap_interval([float(verdict) for verdict in verdicts])
    accuracy = sum(verdicts) / len(verdicts)
    print(f"{name:28} {accuracy:6.1%}  [{low:.1%}, {high:.1%}] of {len(verdicts)} problems")


def compare(prompts: Prompts, rows: list[dict], lm_eval_rows: dict[str, LmEvalRow]) -> None:
    """Prints what both sides have in common, and the problems with different verdicts."""
    pairs = [(row, lm_eval_rows[row["question"]]) for row in rows]
    num_prompts = sum(prompts.text(problem_of(row)) == other.prompt for row, other in pairs)
    num_texts = sum(row["completion"].strip() == other.completion.strip() for row, other in pairs)
    print(f"{len(pairs)} problems: equal prompts {num_prompts}, equal completions {num_texts}")
    verdicts = [row["verdict"] == "correct" for row in rows]
    print_accuracy("grpo accuracy", verdicts)
    print(f"  no final answer {sum(final_answer(row['completion']) is None for row in rows)}")
    for name in FILTERS:
        other_verdicts = [other.is_correct[name] for _, other in pairs]
        print_accuracy(f"lm-eval {name}", other_verdicts)
        num_invalid = sum(other.answers[name] == "[invalid]" for _, other in pairs)
        num_equal = sum(map(bool.__eq__, verdicts, other_verdicts))
        print(f"  no answer {num_invalid}, equal verdicts {num_equal}")
        for row, other in pairs:
            if (row["verdict"] == "correct") != other.is_correct[name]:
                print(
                    f"  {row['problem']}: gold {row['answer']}, grpo {row['verdict']} "
                    f"{final_answer(row['completion'])!r}, lm-eval {other.answers[name]!r}; "
                    f"the completion ends in {row['completion'][-60:]!r}"
                )


def problem_of(row: dict) -> Problem:
    return Problem(id=row["problem"], question=row["question"], answer="", source="agreement")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", required=True, metavar="FILE")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lm-eval", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--system", metavar="TEXT")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        folder.mkdir(exist_ok=True)
        problems_file = write_problems(options, folder)
        model_dir = models.resolve(options.model, None, folder / "model", 0)
        rows = evaluate_with_grpo(options, model_dir, problems_file)
        lm_eval_rows = evaluate_with_lm_eval(options, model_dir, problems_file)
        tokenizer = models.load_tokenizer(model_dir)
        eos_token_ids = models.eos_token_ids(model_dir)
        compare(Prompts(prompt_settings(options), tokenizer, eos_token_ids), rows, lm_eval_rows)


if __name__ == "__main__":
    main()
