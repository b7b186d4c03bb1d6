"""Packages import only lower layers and declared dependencies; the formatter is always on.

The imports are read from the syntax trees. No package is imported.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("grpo", "rewards", "data")


def python_files() -> list[Path]:
    files: list[Path] = []
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return sorted(files)


for_every_file = pytest.mark.parametrize(
    "path", python_files(), ids=lambda path: str(path.relative_to(ROOT))
)

# A package imports itself and packages of lower layers, but no other package of its own layer.
LAYERS = [
    {"grpo.types"},
    {"grpo.json_lines", "grpo.files"},
    {"grpo.data", "grpo.rewards", "grpo.run"},
    {"grpo.config"},
    {"grpo.losses", "grpo.metrics"},
    {"grpo.learning"},
    {"grpo.engines"},
    {"grpo.experience"},
    {"grpo.training"},
    {"grpo.stages"},
    {"grpo.tools"},
    {"grpo.cli", "grpo.api"},
    {"grpo.__main__"},
]
# grpo/__init__.py names the Python interface, which it imports only when it is used.
TOP_LAYER = len(LAYERS)
LAYER_OF = {}
for index, packages in enumerate(LAYERS):
    LAYER_OF.update(dict.fromkeys(packages, index))


def imported_modules(path: Path) -> set[str]:
    """Returns every module that a file imports, also inside functions and for type checking.

    `from a import b` imports `a` and possibly the module `a.b`, so both are returned.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def imported_roots(path: Path) -> set[str]:
    """Returns the top-level packages that a file imports, for example {"torch", "grpo"}."""
    return {module.partition(".")[0] for module in imported_modules(path)}


def package_of(module: str) -> str | None:
    """Returns the package in LAYERS that contains a module, None if there is none.

    For example "grpo.learning" for "grpo.learning.batch", and None for "torch".
    """
    root, *submodules = module.split(".")
    if root != "grpo":
        return None
    package = ".".join(["grpo", *submodules[:1]])
    return package if package in LAYER_OF else None


def module_of(path: Path) -> str:
    """Returns the name under which a file is imported: "grpo.rewards.code" for rewards/code.py."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] == "grpo" else f"grpo.{name}"


def test_every_package_has_a_layer():
    modules = {module_of(path) for path in python_files()}
    assert {module for module in modules if package_of(module) is None} == {"grpo"}


@for_every_file
def test_a_file_imports_only_from_lower_layers_and_its_own_package(path):
    package = package_of(module_of(path))
    imported = {package_of(module) for module in imported_modules(path)} - {None, package}
    layer = LAYER_OF.get(package, TOP_LAYER)
    assert {other for other in imported if LAYER_OF[other] >= layer} == set()
    if package in ("grpo.data", "grpo.rewards"):
        assert imported <= {"grpo.types", "grpo.json_lines"}


@for_every_file
def test_vllm_and_deepspeed_are_each_imported_in_one_package_only(path):
    roots = imported_roots(path)
    package = package_of(module_of(path))
    assert "vllm" not in roots or package == "grpo.engines"
    assert "deepspeed" not in roots or package == "grpo.learning"


# Packages that only some machines or runs need.
OPTIONAL = {
    "vllm",  # the extras cpu and cuda
    "triton",  # a dependency of torch for CUDA
    "wandb",  # logging.trackers; tensorboard is imported through torch
    "trackio",
}
IMPORT_NAMES = {"pyyaml": "yaml"}  # project name -> import name, where they differ


def declared_packages() -> set[str]:
    """Returns the import names of the dependencies in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = set()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("-", "_")
        names.add(IMPORT_NAMES.get(name, name))
    return names


@for_every_file
def test_every_imported_package_is_declared(path):
    third_party = imported_roots(path) - set(sys.stdlib_module_names) - {"grpo"}
    assert third_party - OPTIONAL <= declared_packages()


CONFIG_CLASS = re.compile(r"^(?:\w+\.)?\w*Config$")


def config_classes_in_isinstance_calls(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            classes = re.split(r"[|,() ]+", ast.unparse(node.args[1]))
            names += [name for name in classes if CONFIG_CLASS.match(name)]
    return names


@for_every_file
def test_no_code_depends_on_the_class_of_a_config(path):
    """Differences between the commands belong in their `Stage`, not in `isinstance` ladders."""
    assert config_classes_in_isinstance_calls(path) == []


def test_the_formatter_is_never_switched_off():
    switches = re.compile(r"# fmt: *(off|skip)")
    for folder in (*FOLDERS, "tests", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not switches.search(path.read_text()), path
