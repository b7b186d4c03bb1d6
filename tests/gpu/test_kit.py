"""Checks of the GPU tests and of the scripts in tests/gpu/kit that need no GPU."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from . import test_3_learner, test_4_runs, test_5_nccl, test_6_deterministic

ROOT = Path(__file__).parents[2]
GPU_TESTS = ROOT / "tests" / "gpu"
KIT = GPU_TESTS / "kit"
GPU_SCRIPT = KIT / "gpu.sh"
BENCHMARKS = ROOT / "tests" / "benchmarks"
SUPPORT = ROOT / "tests" / "support"

IMPORT_SCRIPTS = """
import importlib, sys
for name in sys.argv[1:]:
    path_before = list(sys.path)
    assert callable(importlib.import_module(name).main), name
    assert sys.path == path_before, name
"""


def test_every_script_can_be_imported():
    scripts = sorted(path.stem for path in KIT.glob("*.py"))
    python_path = os.pathsep.join([str(BENCHMARKS), str(KIT)])
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_SCRIPTS, *scripts]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def is_ours(module_name):
    """Returns whether a module is in grpo, tests/benchmarks or tests/support."""
    top_level, _, _ = module_name.partition(".")
    file_name = f"{top_level}.py"
    return top_level == "grpo" or any(
        (folder / file_name).exists() for folder in (BENCHMARKS, SUPPORT)
    )


def missing_names(source):
    """Returns the names of ours that a program uses and that do not exist.

    An import of the program checks only the names that it uses outside functions. This function
    checks the names that the program imports from modules of ours, and the attributes of these
    modules and classes, such as `models.load_model` and `ChildEngine.generate`, in the whole
    program. It does not check attributes of instances.
    """
    nodes = list(ast.walk(ast.parse(source)))
    owners = {}  # name in the program -> module, class or other object
    missing = []
    for node in nodes:
        if isinstance(node, ast.Import):
            owners |= imported_modules(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and is_ours(node.module):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if has_attribute(module, alias.name):
                    owners[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    missing.append(f"{node.module}.{alias.name}")
    for node in nodes:
        if isinstance(node, ast.Attribute):
            owner = resolve(node.value, owners)
            if is_module_or_class(owner) and not has_attribute(owner, node.attr):
                missing.append(ast.unparse(node))
    return missing


def imported_modules(statement):
    """Returns the modules of ours that an `import` statement binds, by their names."""
    modules = {}
    for alias in statement.names:
        if not is_ours(alias.name):
            continue
        module = importlib.import_module(alias.name)
        if alias.asname is not None:
            modules[alias.asname] = module
        else:  # `import grpo.learning` binds `grpo`
            top_level, _, _ = alias.name.partition(".")
            modules[top_level] = importlib.import_module(top_level)
    return modules


def is_module_or_class(value):
    return inspect.ismodule(value) or inspect.isclass(value)


def has_attribute(owner, name):
    """Returns whether a module or a class has an attribute; a submodule of a package counts."""
    if hasattr(owner, name):
        return True
    if inspect.isclass(owner):
        return name in inspect.get_annotations(owner)  # a field without a default
    try:
        importlib.import_module(f"{owner.__name__}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def resolve(expression, owners):
    """Returns the object that `name` or `name.attribute...` stands for, or None if unknown."""
    if isinstance(expression, ast.Name):
        return owners.get(expression.id)
    if isinstance(expression, ast.Attribute):
        owner = resolve(expression.value, owners)
        if is_module_or_class(owner):
            return getattr(owner, expression.attr, None)
    return None


@pytest.fixture
def benchmarks_path(monkeypatch):
    """Makes tests/benchmarks importable, as gpu.sh does."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("path", [*KIT.glob("*.py"), *GPU_TESTS.glob("*.py")], ids=lambda p: p.stem)
def test_every_name_of_ours_exists(benchmarks_path, path):
    """GPU tests and scripts do not run here, so nothing else finds a name that has changed."""
    assert missing_names(path.read_text()) == []


def test_missing_names_are_found_in_functions(benchmarks_path):
    program = """
import gpu_cycle
import grpo.learning.models as m
from grpo.engines.local.child import ChildEngine, Sibling
from grpo.learning import models, no_module

def function():
    from grpo.learning import packing

    models.load_model, m.bar, models.bar.baz
    ChildEngine.generate, ChildEngine.foo
    packing._varlen_attention, packing._varlen
    gpu_cycle.write_model, gpu_cycle.read_model
"""
    assert sorted(missing_names(program)) == [
        "ChildEngine.foo",
        "gpu_cycle.read_model",
        "grpo.engines.local.child.Sibling",
        "grpo.learning.no_module",
        "m.bar",
        "models.bar",
        "packing._varlen",
    ]


def test_configs_of_the_gpu_tests_are_valid():
    """`tiny_config` raises UserError for keys and values that no run accepts."""
    for stage in (1, 2, 3):
        for offload in (False, True):
            test_3_learner.learner_config("run", "model", "bfloat16", stage, offload=offload)
    test_4_runs.run_config("run", "model")
    test_5_nccl.run_config("run", "model", staleness=1)
    test_6_deterministic.learner_config("run", "model")
    test_6_deterministic.run_config("run", "model")


def test_gk_child_times_methods_that_exist(monkeypatch):
    from grpo.engines.local.child import ChildEngine

    monkeypatch.syspath_prepend(KIT)
    gk_child = importlib.import_module("gk_child")
    for name in gk_child.TIMED_METHODS:
        assert callable(getattr(ChildEngine, name))


@pytest.fixture
def gk_setup(monkeypatch):
    monkeypatch.syspath_prepend(KIT)
    return importlib.import_module("gk_setup")


def test_setup_names_the_dependencies_that_are_missing(gk_setup):
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert gk_setup.missing_dependencies(pyproject) == []
    one_more = pyproject.replace("dependencies = [", 'dependencies = ["no_such-package>=1", ', 1)
    assert gk_setup.missing_dependencies(one_more) == ["no_such-package"]


def test_setup_knows_every_link_of_the_package(gk_setup):
    links = {
        str(path.relative_to(ROOT)) for path in (ROOT / "grpo").rglob("*") if path.is_symlink()
    }
    assert links == set(gk_setup.LINKS)


def test_setup_restores_links_that_were_not_copied(gk_setup, tmp_path):
    for name in ("grpo/files", "rewards", "data", "configs", "launch"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rewards" / "mine.py").touch()
    (tmp_path / "grpo" / "data").write_text("../data")
    gk_setup.restore_links(tmp_path)
    gk_setup.restore_links(tmp_path)
    assert (tmp_path / "grpo" / "rewards" / "mine.py").is_file()
    assert all((tmp_path / link).is_dir() for link in gk_setup.LINKS)


def test_setup_unpacks_wheels(gk_setup, monkeypatch, tmp_path):
    monkeypatch.setattr(gk_setup, "KIT", tmp_path / "gk")
    with zipfile.ZipFile(tmp_path / "example-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("example.py", "")
    gk_setup.unpack(tmp_path)
    assert (tmp_path / "gk/site/example.py").exists()


def test_every_script_is_used_by_a_step_and_the_readme_explains_every_step():
    subprocess.run(["bash", "-n", str(GPU_SCRIPT)], check=True)
    text = GPU_SCRIPT.read_text()
    used = set(re.findall(r"\$scripts/(\w+\.\w+)", text))
    used.add("gk_child.py")  # started by gk_cycle.py
    used.add("gpu.sh")
    assert used == {path.name for path in KIT.iterdir() if path.is_file()}
    steps = re.findall(r"^    (\w+)\*?\)", text, re.MULTILINE)
    assert len(steps) == 14, steps
    readme = (GPU_TESTS / "README.md").read_text()
    for step in steps:
        assert f"| `{step}" in readme, step


def test_every_step_with_tests_collects_tests_and_the_readme_lists_every_file():
    steps_with_tests = re.findall(r"\) tests (\w+) (.+) ;;", GPU_SCRIPT.read_text())
    assert len(steps_with_tests) == 6, steps_with_tests
    targets = set()
    for _, arguments in steps_with_tests:
        targets.update(arguments.split())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *sorted(targets)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    node_ids = result.stdout.splitlines()
    for target in targets:
        assert any(node_id.startswith(target) for node_id in node_ids), target

    test_files = {path.name for path in GPU_TESTS.glob("test_[0-9]_*.py")}
    assert {Path(target.partition("::")[0]).name for target in targets} == test_files
    readme = (GPU_TESTS / "README.md").read_text()
    for name in test_files:
        assert f"| `{name}` |" in readme, name
