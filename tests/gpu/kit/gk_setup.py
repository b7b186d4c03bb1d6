"""Unpacks the archives in .gpukit/a into /tmp/gk; makes the packages and the project importable.

gk_setup.py CHECKOUT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

KIT = Path("/tmp/gk")
ARCHIVES = {
    "kit.tar.xz": KIT,  # packages
    "grpo.tar.xz": KIT / "repo",  # the project, if it is not in CHECKOUT
    "data.tar.xz": KIT / "data",  # the data set for the step `gsm8k` of gpu.sh
}


def unpack(archives: Path) -> None:
    """Unpacks those of ARCHIVES that exist, unless an earlier call has unpacked them.

    Always copies the parts of SmolLM2: every call may send further parts.
    """
    (KIT / "parts").mkdir(parents=True, exist_ok=True)
    for part in archives.glob("smollm2.part*"):
        shutil.copy(part, KIT / "parts")
    if (KIT / "ready").exists():
        return
    for name, target in ARCHIVES.items():
        if (archives / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["tar", "-xJf", archives / name, "-C", target], check=True)
    (KIT / "ready").touch()


def make_importable(checkout: Path) -> Path:
    """Puts the unpacked packages, then the project, before this Python's packages on sys.path.

    This needs a .pth file, because tests replace PYTHONPATH for the runs that they start.

    Returns:
        The .pth file.
    """
    project = checkout if (checkout / "grpo").is_dir() else KIT / "repo"
    # Python code for the .pth file: the index of site-packages in sys.path.
    index = (
        "next((i for i, p in enumerate(sys.path) if p.endswith('site-packages')), len(sys.path))"
    )
    pth = Path(sysconfig.get_paths()["purelib"], "gpukit.pth")
    pth.write_text(f"import sys; sys.path[{index}:0] = [{str(KIT / 'site')!r}, {str(project)!r}]\n")
    # vLLM's processes find the project's plugin through its entry point.
    metadata = KIT / "site/grpo-0.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: grpo\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngrpo = grpo.engines.servers.plugin:register\n"
    )
    return pth


def main(checkout: Path) -> None:
    start = time.monotonic()
    unpack(checkout / ".gpukit/a")
    pth = make_importable(checkout)
    print(f"unpacked in {time.monotonic() - start:.1f} s; {pth}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
