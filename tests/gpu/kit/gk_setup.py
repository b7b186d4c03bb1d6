"""Unpacks .gpukit/a (archives, wheels) into /tmp/gk and makes packages and project importable.

gk_setup.py CHECKOUT
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

KIT = Path("/tmp/gk")
ARCHIVES = {
    "kit.tar.xz": KIT,  # packages
    "grpo.tar.xz": KIT / "repo",  # the project, if it is not in CHECKOUT
    "data.tar.xz": KIT / "data",  # the data set for the step `gsm8k` of gpu.sh
}

LINKS = {
    "grpo/rewards": "rewards",
    "grpo/data": "data",
    "grpo/files/configs": "configs",
    "grpo/files/launch": "launch",
}


def unpack(archives: Path) -> None:
    """Unpacks wheels and those of ARCHIVES that exist, unless an earlier call has unpacked them."""
    if (KIT / "ready").exists():
        return
    for name, target in ARCHIVES.items():
        if (archives / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["tar", "-xJf", archives / name, "-C", target], check=True)
    for wheel in archives.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(KIT / "site")
    (KIT / "ready").touch()


def make_importable(project: Path) -> Path:
    """Puts the unpacked packages, then the project, before this Python's packages on sys.path.

    This needs a .pth file, because tests replace PYTHONPATH for the runs that they start.

    Returns:
        The .pth file.
    """
    # Python code for the .pth file: the index of site-packages in sys.path.
    index = (
        "next((i for i, p in enumerate(sys.path) if p.endswith('site-packages')), len(sys.path))"
    )
    pth = Path(sysconfig.get_paths()["purelib"], "gpukit.pth")
    pth.write_text(f"import sys; sys.path[{index}:0] = [{str(KIT / 'site')!r}, {str(project)!r}]\n")
    # vLLM's processes find the project's plugin through its entry point.
    metadata = KIT / "site/grpo_trainer-0.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: grpo-trainer\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngrpo = grpo.engines.servers.plugin:register\n"
    )
    return pth


def restore_links(project: Path) -> None:
    """Creates the links of the package to other folders if the copy of the project lacks them."""
    for link, folder in LINKS.items():
        path = project / link
        if not path.is_dir():
            path.unlink(missing_ok=True)  # some tools copy a link as a file
            path.symlink_to(project / folder)


def missing_dependencies(pyproject: str) -> list[str]:
    """Returns the names of the dependencies that a project declares and that are not installed."""
    missing = []
    for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
        name = Requirement(requirement).name
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def main(checkout: Path) -> None:
    start = time.monotonic()
    unpack(checkout / ".gpukit/a")
    project = checkout if (checkout / "grpo").is_dir() else KIT / "repo"
    restore_links(project)
    pth = make_importable(project)
    print(f"unpacked in {time.monotonic() - start:.1f} s; {pth}")
    sys.path.insert(0, str(KIT / "site"))  # the .pth file has no effect on this process
    missing = missing_dependencies((project / "pyproject.toml").read_text())
    if missing:
        print("MISSING: " + ", ".join(missing))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
