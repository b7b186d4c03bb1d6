"""Compares the accuracy verifier with other verifiers on labeled cases.

    .venv/bin/python tests/benchmarks/verifier_audit.py [CASES.jsonl ...] [OPTIONS]

The default file is tests/rewards/verifier_cases.jsonl. Each line contains `prediction`, `gold`,
`label` (correct or wrong) and `category`. Prints the tables of docs/rewards.md ("Accuracy of the
verifier"): the verdicts of each verifier, and those that are wrong per category.

    --grader NAME=FILE:FUNCTION    a further verifier, such as the grader of another trainer: a
                                   function of a text with the answer and of the gold answer. It
                                   returns a number, a boolean, or a dictionary with `score`
    --held-out                     only the cases that were written and judged after the verifier
                                   had been changed for the last time (`held_out: last`)
    --pool                         also measures verdicts per second: the worker pool on 2 workers,
                                   and math-verify in one process on the same cases

The other verifiers read answers in boxes. They receive the answer that grpo's parser finds in the
prediction, in a box. Latency is the CPU time of one call in a warm process: each verifier evaluates
all cases twice, and only the second time counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from grpo.rewards import accuracy
from grpo.rewards.verifier.parse import TAGS, final_answer
from grpo.rewards.workers.pool import WorkerPool

DEFAULT_CASES = Path(__file__).parents[1] / "rewards" / "verifier_cases.jsonl"
QUANTILES = (0.5, 0.95, 1)  # median, 95th percentile, slowest


def boxed(prediction: str) -> str:
    r"""Returns the answer in a prediction as `\boxed{...}`, or the prediction if it has none."""
    answer: str | None = prediction
    if any(mark in prediction for mark in (*TAGS, r"\boxed")):
        answer = final_answer(prediction)
    if answer is None:
        return prediction
    return rf"\boxed{{{answer}}}"


def verify_with_grpo(prediction: str, gold: str) -> bool:
    return accuracy.verify(prediction, gold).value == "correct"


def verify_with_math_verify(prediction: str, gold: str) -> bool:
    return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(boxed(prediction))))


def verify_with_trl(prediction: str, gold: str) -> bool:
    (reward,) = accuracy_reward([[{"content": boxed(prediction)}]], [rf"\boxed{{{gold}}}"])
    return reward == 1.0


def verify_by_string_equality(prediction: str, gold: str) -> bool:
    return without_whitespace(boxed(prediction)) == without_whitespace(boxed(rf"\boxed{{{gold}}}"))


def without_whitespace(text: str) -> str:
    return re.sub(r"\s", "", text)


VERIFIERS = {
    "grpo": verify_with_grpo,
    "math-verify": verify_with_math_verify,
    "TRL accuracy_reward": verify_with_trl,
    "string equality": verify_by_string_equality,
}


def load_grader(path: Path, function: str) -> Callable[[str, str], bool]:
    """Returns a verifier that calls a function of a file outside of grpo."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def grade(prediction: str, gold: str) -> bool:
        try:
            score = getattr(module, function)(f"Answer: {boxed(prediction)}", gold)
        except Exception:  # such a call would end or mislead a run; here it counts as wrong
            return False
        if isinstance(score, dict):
            score = score["score"]
        return float(score) > 0.5

    return grade


@dataclass
class Audit:
    """The verdicts of one verifier on all cases."""

    seconds: list[float] = field(default_factory=list)  # CPU time of each call
    num_false_positives: int = 0
    num_false_negatives: int = 0
    wrong_categories: list[str] = field(default_factory=list)  # category of each wrong verdict


def audit(verifier: Callable[[str, str], bool], cases: list[dict[str, str]]) -> Audit:
    for case in cases:  # warm-up
        verifier(case["prediction"], case["gold"])
    result = Audit()
    for case in cases:
        start = time.process_time()
        verdict = verifier(case["prediction"], case["gold"])
        result.seconds.append(time.process_time() - start)
        if verdict == (case["label"] == "correct"):
            continue
        result.wrong_categories.append(case["category"])
        if verdict:
            result.num_false_positives += 1
        else:
            result.num_false_negatives += 1
    return result


def table_row(name: str, result: Audit) -> str:
    num_cases = len(result.seconds)
    sorted_seconds = sorted(result.seconds)
    latencies = []
    for quantile in QUANTILES:
        index = min(int(num_cases * quantile), num_cases - 1)
        latencies.append(f"{1000 * sorted_seconds[index]:.1f} ms")
    share_correct = 1 - len(result.wrong_categories) / num_cases
    return (
        f"| {name} | {share_correct:.1%} | {result.num_false_positives} | "
        f"{result.num_false_negatives} | {' | '.join(latencies)} |"
    )


def print_tables(
    verifiers: dict[str, Callable[[str, str], bool]], cases: list[dict[str, str]]
) -> None:
    print(
        "| verifier | correct | false positives | false negatives | median | 95th percentile | "
        "slowest |\n|---|---|---|---|---|---|---|"
    )
    wrong_by_category: dict[str, Counter[str]] = {}  # category -> verifier -> wrong verdicts
    for name, verifier in verifiers.items():
        result = audit(verifier, cases)
        print(table_row(name, result), flush=True)
        for category in result.wrong_categories:
            wrong_by_category.setdefault(category, Counter())[name] += 1
    cases_by_category = Counter(case["category"] for case in cases)
    print(f"\nwrong verdicts\n| category | cases | {' | '.join(verifiers)} |")
    print("|---" * (2 + len(verifiers)) + "|")
    for category, count in sorted(cases_by_category.items()):
        wrong = wrong_by_category.get(category, Counter())
        numbers = " | ".join(str(wrong[name]) for name in verifiers)
        print(f"| {category} | {count} | {numbers} |")


def print_rates(cases: list[dict[str, str]]) -> None:
    """Prints the verdicts per second of the worker pool and of math-verify."""
    calls = [(case["prediction"], case["gold"]) for case in cases]
    with WorkerPool(2) as pool:
        for _ in range(2):  # the first time starts the workers
            start = time.perf_counter()
            pool.map("grpo.rewards.accuracy:verify", calls, timeout_s=accuracy.TIMEOUT_S)
            seconds = time.perf_counter() - start
    print(f"\nworker pool, 2 workers: {len(calls) / seconds:,.0f} verdicts per second")
    start = time.perf_counter()
    for prediction, gold in calls:
        verify_with_math_verify(prediction, gold)
    seconds = time.perf_counter() - start
    print(f"math-verify, one process: {len(calls) / seconds:,.0f} verdicts per second")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=Path, default=[DEFAULT_CASES])
    parser.add_argument("--grader", action="append", default=[], metavar="NAME=FILE:FUNCTION")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--pool", action="store_true")
    options = parser.parse_args()
    cases = []
    for path in options.files:
        cases += [json.loads(line) for line in path.read_text().splitlines()]
    if options.held_out:
        cases = [case for case in cases if case.get("held_out") == "last"]
    verifiers = dict(VERIFIERS)
    for grader in options.grader:
        name, _, location = grader.partition("=")
        file, _, function = location.rpartition(":")
        verifiers[name] = load_grader(Path(file), function)
    print_tables(verifiers, cases)
    if options.pool:
        print_rates(cases)


if __name__ == "__main__":
    main()
