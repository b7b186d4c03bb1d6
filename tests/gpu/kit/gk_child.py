"""The engine's child (grpo/engines/local/child.py), which prints the seconds of each call."""

from __future__ import annotations

import sys
import time
from typing import Any

from grpo.engines.local.child import ChildEngine, main

TIMED = (
    "generate",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "sleep",
    "wake",
)


def time_calls(name: str) -> None:
    plain = getattr(ChildEngine, name)

    def call(self: ChildEngine, **arguments: Any) -> Any:
        begun = time.perf_counter()
        result = plain(self, **arguments)
        size = (
            f" of {sum(request.n for request in arguments['requests'])}"
            if name == "generate"
            else ""
        )
        print(f"TIMED {name}{size}: {time.perf_counter() - begun:.4f} s", flush=True)
        return result

    setattr(ChildEngine, name, call)


if __name__ == "__main__":
    for timed in TIMED:
        time_calls(timed)
    main(int(sys.argv[1]), int(sys.argv[2]))
