"""Who may import whom, read from the syntax trees; and that all code is formatted."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for package in ("grpo", "rewards", "data") for path in (ROOT / package).rglob("*.py")
)
OURS = ("grpo", "rewards", "data")
PURE = (
    "grpo/advantages.py",
    "grpo/batch.py",
    "grpo/logprobs.py",
    "grpo/packing.py",
    "grpo/divergence.py",
    "grpo/selection.py",
    "grpo/losses/",
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, except for type checking alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(modules: set[str], *prefixes: str) -> set[str]:
    return {
        module
        for module in modules
        if any(module == p or module.startswith(p + ".") for p in prefixes)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name, modules = str(path.relative_to(ROOT)), imports(path)
    if name == "grpo/types.py":
        assert not under(modules, *OURS, "torch")
    if name.startswith(("data/", "rewards/")):
        assert under(modules, "grpo") <= under(modules, "grpo.types")
    if name.startswith(PURE):
        assert not under(
            modules,
            "grpo.engines",
            "grpo.learners",
            "grpo.stages",
            "grpo.checkpoint",
            "os",
            "pathlib",
        )
    if not name.startswith("grpo/engines/"):
        assert not under(modules, "vllm")
    if not name.startswith("grpo/learners/"):
        assert not under(modules, "deepspeed")
    if name not in ("grpo/cli.py",) and not name.startswith("grpo/stages/"):
        assert not under(modules, "grpo.stages")


def test_the_formatter_is_switched_off_nowhere():
    switches = re.compile(r"# fmt: *(off|skip)")
    for folder in (*OURS, "tests", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not switches.search(path.read_text()), path
