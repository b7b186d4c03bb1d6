"""Imports the modules of functions that a config names, in the trainer and in reward workers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# Time of the last change of each imported module's file, by the module's name in `sys.modules`.
_change_times: dict[str, int] = {}


def import_module(name: str) -> ModuleType:
    """Imports a module by its name, or a file by its path: "my_rewards", "lib/my_rewards.py".

    A file is registered in `sys.modules` under its absolute path, so that it cannot shadow another
    module, and so that its functions can be imported again from their `__module__`. The modules
    next to it can be imported; installed packages come first.

    A module is imported again if its file has changed since this function has imported it: in a
    notebook, a run uses the functions as they are in the file.

    Raises:
        FileNotFoundError: There is no such file.
        Exception: Whatever the module raises.
    """
    importlib.invalidate_caches()  # the file may be newer than the import system's list of files
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        name = str(path)
        _forget_if_changed(name)
        module = sys.modules.get(name) or _import_file(path)
    else:
        _forget_if_changed(name)
        module = importlib.import_module(name)
    change_time = _change_time(module)
    if change_time is not None:
        _change_times[name] = change_time
    return module


def _import_file(path: Path) -> ModuleType:
    full_name = str(path)
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


def _forget_if_changed(name: str) -> None:
    """Removes a module from `sys.modules` if its file has changed since `import_module`."""
    module = sys.modules.get(name)
    if module is None or name not in _change_times:
        return
    if _change_time(module) != _change_times[name]:
        del sys.modules[name]


def _change_time(module: ModuleType) -> int | None:
    """Returns when a module's file was changed, None if it has no file."""
    try:
        return Path(module.__file__ or "").stat().st_mtime_ns
    except (AttributeError, OSError):
        return None


def add_to_search_path(folder: Path) -> None:
    """Lets modules in a folder be imported.

    The folder is searched last, so that its modules do not shadow installed packages.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
