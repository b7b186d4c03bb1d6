"""Short hashes with which ranks check that they start from the same code, tokenizer and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo.types import Problem

ROOT = Path(__file__).parents[2]
PACKAGES = ("grpo", "rewards", "data")


def of_text(text: str) -> str:
    """Returns the first 64 bits of a text's SHA-256, in hexadecimal: "9f86d081884c7d65"."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_code() -> str:
    """Returns the fingerprint of all Python files in grpo's packages on this machine."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def of_tokenizer(tokenizer: Any) -> str:
    """Returns the fingerprint of a tokenizer's vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return of_text(json.dumps([vocabulary, tokenizer.chat_template]))


def of_problems(problems: Sequence[Problem]) -> str:
    """Returns the fingerprint of problems, with all their fields and in this order."""
    return of_text(json.dumps([asdict(problem) for problem in problems], default=str))
