"""Unpacks the archive of packages into /tmp/gk and makes it known to this Python.

gk_setup.py CHECKOUT.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

KIT = Path("/tmp/gk")
ARCHIVES = {"kit.tar.xz": KIT, "grpo.tar.xz": KIT / "repo", "data.tar.xz": KIT / "data"}


def unpack(archives: Path) -> None:
    """Unpacks what is there of ARCHIVES, once.

    Keeps parts of SmolLM2, which come with several calls.
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
    """Puts the packages before those of this Python, and the project before both.

    Returns the file that does it. It is a .pth file and not PYTHONPATH, which tests set for the
    runs that they start.
    """
    project = checkout if (checkout / "grpo").is_dir() else KIT / "repo"
    place = (
        "next((i for i, p in enumerate(sys.path) if p.endswith('site-packages')), len(sys.path))"
    )
    pth = Path(sysconfig.get_paths()["purelib"], "gpukit.pth")
    pth.write_text(f"import sys; sys.path[{place}:0] = [{str(KIT / 'site')!r}, {str(project)!r}]\n")
    # vLLM's processes find the project's plugin by its entry point
    metadata = KIT / "site/grpo-0.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: grpo\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngrpo = grpo.engines.servers.plugin:register\n"
    )
    return pth


def main(checkout: Path) -> None:
    begun = time.monotonic()
    unpack(checkout / ".gpukit/a")
    pth = make_importable(checkout)
    print(f"unpacked in {time.monotonic() - begun:.1f} s; {pth}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
