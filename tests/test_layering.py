"""Who may import whom, read from the syntax trees; and that all code is formatted."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("grpo", "rewards", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# A package imports packages of lower floors, and itself; none beside it, none above it.
FLOORS = [
    {"grpo.types"},
    {"data", "rewards", "grpo.run"},
    {"grpo.config"},
    {"grpo.losses", "grpo.metrics"},
    {"grpo.learning"},
    {"grpo.engines"},
    {"grpo.experience"},
    {"grpo.training"},
    {"grpo.stages"},
    {"grpo.tools"},
    {"grpo.cli"},
    {"grpo.__main__"},
]
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def imported_modules(path: Path) -> set[str]:
    """Returns every module that a file imports anywhere, for type checking too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def package_of(module: str) -> str | None:
    """Returns the package that a module of ours belongs to: `grpo.learning`, `rewards`."""
    first, *rest = module.split(".")
    if first not in PACKAGES:
        return None
    if first != "grpo":
        return first
    package = ".".join(["grpo", *rest[:1]])
    return package if package in FLOOR_OF else None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_package_has_a_floor():
    homeless = {module_of(path) for path in FILES if package_of(module_of(path)) is None}
    assert homeless == {"grpo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors_and_its_own_package(path):
    own = package_of(module_of(path))
    packages = {package_of(module) for module in imported_modules(path)} - {None, own}
    assert {package for package in packages if FLOOR_OF[package] >= FLOOR_OF.get(own, 0)} == set()
    if own in ("data", "rewards"):
        assert packages <= {"grpo.types"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_vllm_and_deepspeed_are_each_imported_in_one_package_only(path):
    roots = {module.partition(".")[0] for module in imported_modules(path)}
    assert "vllm" not in roots or package_of(module_of(path)) == "grpo.engines"
    assert "deepspeed" not in roots or package_of(module_of(path)) == "grpo.learning"


# Packages that only some machines or runs need.
OPTIONAL = {
    "vllm",  # the extras cpu and cuda
    "triton",  # comes with torch for CUDA
    "wandb",  # logging.trackers; tensorboard is imported through torch
    "trackio",
}
IMPORT_NAMES = {"pyyaml": "yaml"}  # where the package has another name


def declared_packages() -> set[str]:
    """Returns the import names of the dependencies in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = set()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("-", "_")
        names.add(IMPORT_NAMES.get(name, name))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_that_is_imported_is_declared(path):
    roots = {module.partition(".")[0] for module in imported_modules(path)}
    foreign = roots - set(sys.stdlib_module_names) - set(PACKAGES)
    assert foreign - OPTIONAL <= declared_packages()


KINDS_OF_CONFIGS = re.compile(r"^(\w+\.)?(\w*Config)$")


def config_classes_asked_for(path: Path) -> list[str]:
    """Returns the config classes in the `isinstance` calls of a file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            classes = re.split(r"[|,() ]+", ast.unparse(node.args[1]))
            names += [name for name in classes if KINDS_OF_CONFIGS.match(name)]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_stage_answers_for_its_kind_so_nobody_asks_for_a_configs_class(path):
    assert config_classes_asked_for(path) == []


def test_the_formatter_is_switched_off_nowhere():
    switches = re.compile(r"# fmt: *(off|skip)")
    for folder in (*PACKAGES, "tests", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not switches.search(path.read_text()), path
