"""The engine's child process (grpo/engines/local/child.py). Prints the seconds of each call."""

from __future__ import annotations

import sys
import time
from typing import Any

from grpo.engines.local import child
from grpo.engines.local.child import ChildEngine

TIMED_METHODS = (
    "generate",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "sleep",
    "wake",
)


def time_calls(name: str) -> None:
    """Replaces a method of ChildEngine by one that prints its duration."""
    method = getattr(ChildEngine, name)

    def timed_method(self: ChildEngine, **arguments: Any) -> Any:
        start = time.perf_counter()
        result = method(self, **arguments)
        size = ""
        if name == "generate":
            size = f" of {sum(request.n for request in arguments['requests'])}"
        print(f"TIMED {name}{size}: {time.perf_counter() - start:.4f} s", flush=True)
        return result

    setattr(ChildEngine, name, timed_method)


def main(pipe_fd: int, parent_pid: int) -> None:
    """Times the calls of the parent. The arguments are those of the child process."""
    for name in TIMED_METHODS:
        time_calls(name)
    child.main(pipe_fd, parent_pid)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
