"""Compares the accuracy verifier with math-verify, TRL and string equality on labeled cases.

    .venv/bin/python tests/benchmarks/verifier_audit.py [CASES.jsonl]

The default file is tests/rewards/verifier_cases.jsonl. Each line contains `prediction`, `gold`,
`label` (correct or wrong) and `category`. Prints the table of docs/rewards.md ("Accuracy of the
verifier") and the number of wrong verdicts per category.

The other verifiers read answers in boxes. They receive the answer that grpo's parser finds in the
prediction, in a box. Latency is the CPU time of one call in a warm process: each verifier evaluates
all cases twice, and only the second time counts.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from rewards import accuracy
from rewards.verifier.parse import TAGS, final_answer

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


def main(path: Path) -> None:
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    print(
        "| verifier | correct | false positives | false negatives | median | 95th percentile | "
        "slowest |\n|---|---|---|---|---|---|---|"
    )
    wrong_by_category: dict[str, Counter[str]] = {}  # category -> verifier -> wrong verdicts
    for name, verifier in VERIFIERS.items():
        result = audit(verifier, cases)
        print(table_row(name, result))
        for category in result.wrong_categories:
            wrong_by_category.setdefault(category, Counter())[name] += 1
    cases_by_category = Counter(case["category"] for case in cases)
    print("\nwrong verdicts per category (number of cases):")
    for category, counts in sorted(wrong_by_category.items()):
        print(f"{category} ({cases_by_category[category]}): {dict(counts)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_CASES)
