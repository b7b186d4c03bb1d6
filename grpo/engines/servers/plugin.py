"""vLLM plugin of grpo. vLLM calls `register` in each of its processes.

pyproject.toml lists `register` under the entry point group `vllm.general_plugins`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from grpo.engines.transfer.receiver_registration import register_receiving_engines

# Environment variable of a local server: the process id of its trainer.
TRAINER_PID_VARIABLE = "GRPO_ENGINE"


def register() -> None:
    """Registers grpo's weight transfer engines.

    In a process of a local server, also starts a thread that kills the server when its trainer or
    the parent of the process has ended.
    """
    register_receiving_engines()
    trainer_pid = os.environ.get(TRAINER_PID_VARIABLE)
    if trainer_pid:
        pids = (os.getppid(), int(trainer_pid))
        threading.Thread(target=_kill_orphaned_group, args=pids, daemon=True).start()


def _kill_orphaned_group(parent_pid: int, trainer_pid: int) -> None:
    """Kills this process group when the parent or the trainer has ended.

    Without this, an engine core outlives a killed server, and a server outlives a killed trainer.
    The parent's id alone does not suffice: the trainer may have ended while this process was still
    importing modules, before it read the id. The process group contains only the processes of the
    server. Killing it also ends an engine core that still waits for its first message, a wait of up
    to 5 minutes.
    """
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == parent_pid:
            os.kill(trainer_pid, 0)  # raises ProcessLookupError if the trainer has ended
            time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
