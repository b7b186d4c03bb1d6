"""grpo: reinforcement learning of reasoning models with GRPO, on vLLM and DeepSpeed.

The program runs on a laptop's CPU, on one GPU and on a cluster. The version is `grpo.__version__`.
The names in `__all__` are its Python interface (grpo/api.py). They are imported when they are used,
so that `import grpo` loads no large library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.api import (
        Run,
        collect,
        distill,
        evaluate,
        load,
        pipeline,
        quantize,
        sft,
        train,
    )
    from grpo.run.callbacks import StopRun
    from grpo.run.signals import RunInterruptedError
    from grpo.stages.loaded_model import Model
    from grpo.types import Completion, Problem, RunError, UserError

__all__ = [
    "Completion",
    "Model",
    "Problem",
    "Run",
    "RunError",
    "RunInterruptedError",
    "StopRun",
    "UserError",
    "collect",
    "distill",
    "evaluate",
    "load",
    "pipeline",
    "quantize",
    "sft",
    "train",
]
# The modules of the names that are not in grpo.api.
_MODULES = {
    "Completion": "grpo.types",
    "Model": "grpo.stages.loaded_model",
    "Problem": "grpo.types",
    "RunError": "grpo.types",
    "RunInterruptedError": "grpo.run.signals",
    "StopRun": "grpo.run.callbacks",
    "UserError": "grpo.types",
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__`, or reads the version, when it is used for the first time."""
    if name == "__version__":
        return _installed_version()
    if name not in __all__:
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    module = importlib.import_module(_MODULES.get(name, "grpo.api"))
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    """Returns the version of the installed distribution, "unknown" if there is none.

    The import is here because it takes longer than the import of grpo itself.
    """
    import importlib.metadata

    try:
        return importlib.metadata.version("grpo-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
