"""The configs and launch scripts that are installed with the package.

In a clone, `grpo/files/configs` and `grpo/files/launch` are links to the folders `configs/` and
`launch/`. A wheel contains the files themselves. This package must work without the dependencies:
`grpo files` prints the folder with the pinned versions before they are installed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from grpo.types import UserError

FOLDER = Path(__file__).parent
CONFIGS = "configs"
LAUNCH = "launch"
# Files of launch/ that need a clone. pyproject.toml excludes them from wheels.
CLONE_ONLY = ("Dockerfile", "setup.sh", "test.sh")


def find_file(path: str) -> Path:
    """Returns the file that a path names: in the working directory, else among the shipped files.

    A relative path that starts with `configs/` and does not exist in the working directory is that
    of a shipped file, if there is one. `find_file("configs/tiny.yaml")` works in every directory.
    """
    file = Path(path).expanduser()
    shipped = FOLDER / file
    if file.parts[:1] == (CONFIGS,) and not file.exists() and shipped.is_file():
        return shipped
    return file


def shipped_configs() -> list[str]:
    """Returns the shipped configs: `["configs/countdown_3b.yaml", "configs/tiny.yaml", ...]`."""
    files = (FOLDER / CONFIGS).rglob("*.yaml")
    return sorted(str(file.relative_to(FOLDER)) for file in files)


def copy_files(target: Path) -> None:
    """Copies the shipped folders to `target/configs` and `target/launch`.

    Raises:
        UserError: One of the folders exists, or cannot be written.
    """
    for name in (CONFIGS, LAUNCH):
        if (FOLDER / name).resolve() in [target.resolve(), *target.resolve().parents]:
            raise UserError(f"--copy {target}: this is a folder of the shipped files")
        if os.path.lexists(target / name):
            raise UserError(
                f"--copy {target}: {target / name} exists. Choose a folder without {CONFIGS}/ and "
                f"{LAUNCH}/"
            )
    ignored = shutil.ignore_patterns("__pycache__", *CLONE_ONLY)
    try:
        for name in (CONFIGS, LAUNCH):
            shutil.copytree(FOLDER / name, target / name, ignore=ignored)
    except OSError as error:
        raise UserError(f"--copy {target}: cannot be written: {error}") from None
