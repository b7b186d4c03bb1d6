"""The accuracy verifier beside math-verify, TRL's accuracy_reward and string equality, on labelled
cases.

    .venv/bin/python tests/benchmarks/verifier_audit.py [CASES.jsonl]

Without a file: tests/rewards/verifier_cases.jsonl. Lines: prediction, gold, label (correct or
wrong), category. The others read boxes: they get the answer that ours found in tags, boxed. Latency
is processor time of one call in a warm process: every verifier judges all cases twice, the second
time counts.
"""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from rewards import accuracy
from rewards.verifier.parse import TAGS, final_answer


def boxed(prediction: str) -> str:
    answer = (
        final_answer(prediction)
        if any(mark in prediction for mark in (*TAGS, r"\boxed"))
        else prediction
    )
    return rf"\boxed{{{answer}}}" if answer is not None else prediction


def ours(prediction: str, gold: str) -> bool:
    return accuracy.verify(prediction, gold).value == "correct"


def math_verify(prediction: str, gold: str) -> bool:
    return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(boxed(prediction))))


def trl(prediction: str, gold: str) -> bool:
    (value,) = accuracy_reward([[{"content": boxed(prediction)}]], [rf"\boxed{{{gold}}}"])
    return value == 1.0


def string(prediction: str, gold: str) -> bool:
    return re.sub(r"\s", "", boxed(prediction)) == re.sub(r"\s", "", boxed(rf"\boxed{{{gold}}}"))


def main(path: Path) -> None:
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    wrong: dict[str, Counter[str]] = {}
    print(
        "| verifier | agrees | false positives | false negatives | median | 95th percentile | "
        "slowest |\n|---|---|---|---|---|---|---|"
    )
    for name, verifier in {
        "ours": ours,
        "math-verify": math_verify,
        "TRL accuracy_reward": trl,
        "string equality": string,
    }.items():
        false: Counter[str] = Counter()
        times = []
        for judged in (False, True):
            for case in cases:
                start = time.process_time()
                found = verifier(case["prediction"], case["gold"])
                times += [time.process_time() - start] * judged
                if judged and found != (case["label"] == "correct"):
                    false["positive" if found else "negative"] += 1
                    wrong.setdefault(case["category"], Counter())[name] += 1
        times.sort()
        shown = " | ".join(
            f"{1000 * times[min(int(len(times) * q), len(times) - 1)]:.1f} ms"
            for q in (0.5, 0.95, 1)
        )
        print(
            f"| {name} | {1 - false.total() / len(cases):.1%} | {false['positive']} | "
            f"{false['negative']} | {shown} |"
        )
    sizes = Counter(case["category"] for case in cases)
    print(
        "\nfalse by category (of how many): "
        + "; ".join(
            f"{name} ({sizes[name]}): {dict(count)}" for name, count in sorted(wrong.items())
        )
    )


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).parents[1] / "rewards" / "verifier_cases.jsonl"
    )
