"""Short hashes with which ranks check that they start from the same code, tokenizer and data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo.types import Problem

PACKAGE_FOLDER = Path(__file__).parents[1]


def fingerprint_text(text: str) -> str:
    """Returns the first 64 bits of a text's SHA-256, in hexadecimal: "9f86d081884c7d65"."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_code() -> str:
    """Returns the fingerprint of all Python files of the installed grpo package."""
    files: list[Path] = []
    # In a checkout, grpo.rewards and grpo.data are links to folders.
    for folder, _, names in os.walk(PACKAGE_FOLDER, followlinks=True):
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(PACKAGE_FOLDER)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Returns the fingerprint of a tokenizer's vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return fingerprint_text(json.dumps([vocabulary, tokenizer.chat_template]))


def fingerprint_problems(problems: Sequence[Problem]) -> str:
    """Returns the fingerprint of problems, with all their fields and in this order."""
    return fingerprint_text(json.dumps([asdict(problem) for problem in problems], default=str))
