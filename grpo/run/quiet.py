"""Silences the libraries that a run imports."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

# Defaults of environment variables that silence the libraries; the user's own values win.
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def silence_libraries() -> None:
    """Silences the libraries until the end of the process."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the libraries within the context, for a process that also runs other code."""
    import tqdm  # noqa: F401 - it reads TQDM_DISABLE once, so this keeps the caller's bars

    names = [name for name in QUIET_ENVIRONMENT if name not in os.environ]
    with warnings.catch_warnings():
        silence_libraries()
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Restores the environment variables at the end of the context.

    A run sets those of its process group, and transformers sets some that select the dtype. The
    next run, and processes that the caller starts, must not inherit them.
    """
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
