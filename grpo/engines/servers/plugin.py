"""vLLM's entry point into this package: called in each of its processes.

pyproject.toml names `register` under `vllm.general_plugins`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from grpo.engines.transfer.receiver_registration import register_receiving_engines

# the environment variable that a local server of a pool has: its trainer's process id
TRAINER_PID_VARIABLE = "GRPO_ENGINE"


def register() -> None:
    """Registers our receiving engines; in a server of a pool, ends the process with its trainer."""
    register_receiving_engines()
    trainer = os.environ.get(TRAINER_PID_VARIABLE)
    if trainer:
        threading.Thread(target=_end_with, args=(os.getppid(), int(trainer)), daemon=True).start()


def _end_with(parent: int, trainer: int) -> None:
    """Kills this process group when the parent or the trainer has ended.

    vLLM's processes outlive each other when killed: a core outlives its server. A server outlives
    its trainer, which may have been killed while this process was still importing. The process
    group is the server's own; a core in it that still waits for a first message (5 minutes) ends
    too.
    """
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == parent:
            os.kill(trainer, 0)
            time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
