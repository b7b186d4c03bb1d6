"""grpo: reinforcement learning of reasoning models with GRPO, on vLLM and DeepSpeed.

The program runs on a laptop's CPU, on one GPU and on a cluster. The version is `grpo.__version__`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Reads the version when it is first used."""
    if name == "__version__":
        return _installed_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _installed_version() -> str:
    """Returns the version of the installed distribution, "unknown" if there is none.

    The import is here because it takes longer than the import of grpo itself.
    """
    import importlib.metadata

    try:
        return importlib.metadata.version("grpo-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
