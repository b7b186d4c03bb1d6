"""Imports the modules of functions that a config names, in the trainer and in reward workers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """Imports a module by its name, or a file by its path: "my_rewards", "lib/my_rewards.py".

    A file is registered in `sys.modules` under its absolute path, so that it cannot shadow another
    module, and so that its functions can be imported again from their `__module__`. The modules
    next to it can be imported; installed packages come first.

    Raises:
        FileNotFoundError: There is no such file.
        Exception: Whatever the module raises.
    """
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    full_name = str(path)
    if full_name in sys.modules:
        return sys.modules[full_name]
    add_to_search_path(path.parent)
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module


def add_to_search_path(folder: Path) -> None:
    """Lets modules in a folder be imported.

    The folder is searched last, so that its modules do not shadow installed packages.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
