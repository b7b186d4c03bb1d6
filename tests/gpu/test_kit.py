"""The scripts for a lent GPU machine (tests/gpu/kit): what can be known of them without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests" / "gpu" / "kit"


def test_every_script_finds_the_names_that_it_imports():
    scripts = sorted(path.stem for path in KIT.glob("*.py"))
    check = (
        f"import {', '.join(scripts)}; assert all(callable(script.main) for script in "
        f"({', '.join(scripts)}))"
    )
    environment = os.environ | {"PYTHONPATH": str(KIT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True)


def test_the_steps_use_every_script_and_the_readme_explains_every_step():
    text = (KIT / "gpu.sh").read_text()
    subprocess.run(["bash", "-n", str(KIT / "gpu.sh")], check=True)
    used = set(re.findall(r"\$scripts/(\w+\.\w+)", text))
    # gk_cycle.py starts gk_child.py
    assert used | {"gk_child.py", "gpu.sh"} == {
        path.name for path in KIT.iterdir() if path.is_file()
    }
    steps = re.findall(r"^    (\w+)\*?\)", text, re.MULTILINE)
    table = (KIT.parent / "README.md").read_text()
    assert len(steps) == 12 and all(f"| `{step}" in table for step in steps), steps
