"""Checks of the scripts in tests/gpu/kit that need no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests" / "gpu" / "kit"

IMPORT_SCRIPTS = """
import importlib, sys
for name in sys.argv[1:]:
    assert callable(importlib.import_module(name).main), name
"""


def test_every_script_can_be_imported():
    scripts = sorted(path.stem for path in KIT.glob("*.py"))
    environment = os.environ | {"PYTHONPATH": str(KIT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_SCRIPTS, *scripts]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_every_script_is_used_by_a_step_and_the_readme_explains_every_step():
    gpu_script = KIT / "gpu.sh"
    subprocess.run(["bash", "-n", str(gpu_script)], check=True)
    text = gpu_script.read_text()
    used = set(re.findall(r"\$scripts/(\w+\.\w+)", text))
    used.add("gk_child.py")  # started by gk_cycle.py
    used.add("gpu.sh")
    assert used == {path.name for path in KIT.iterdir() if path.is_file()}
    steps = re.findall(r"^    (\w+)\*?\)", text, re.MULTILINE)
    assert len(steps) == 12, steps
    readme = (KIT.parent / "README.md").read_text()
    for step in steps:
        assert f"| `{step}" in readme, step
