"""What runs inside a vLLM server of a pool.

This is our weight transfer, a guard on every route, and an end when its parent ends.

vLLM's own key guards /v1 and /inference only; the routes that change weights or pause it would be
open to everybody who reaches the port.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import threading
import time
from typing import Any

TOKEN = "GRPO_ENGINE_TOKEN"  # environment variable: what every request has to bring
# of _transfer.py
BACKENDS = {
    "memory": "MemoryTransfer",
    "file": "MemoryTransfer",
    "ipc": "IpcTransfer",
    "nccl": "NcclTransfer",
}
ROUTES = (
    "/health",
    "/metrics",
    "/inference/v1/generate",
    "/reset_prefix_cache",
    "/pause",
    "/resume",
    "/abort_requests",
    "/weight_info",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, engine in BACKENDS.items():
        with contextlib.suppress(ValueError):  # registered already
            WeightTransferEngineFactory.register_engine(
                f"grpo_{name}", "grpo.engines.transfer.receivers", engine
            )
    # one of ours, not just any vLLM of this environment
    if trainer := os.environ.get("GRPO_ENGINE"):
        threading.Thread(target=_end_with, args=(os.getppid(), int(trainer)), daemon=True).start()


def _end_with(parent: int, trainer: int) -> None:
    """Ends this process with its parent: vLLM's processes outlive each other when killed.

    A core outlives its server, and a server outlives its trainer, which may have been killed while
    this process was still importing. The process group is the server's own; a core in it that still
    waits for a first word (5 minutes) ends too.
    """
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == parent:
            os.kill(trainer, 0)
            time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


class Guard:
    """ASGI middleware (`--middleware`) that refuses requests without the token or to other routes.

    It answers 401 without the token, and 403 for a route that a pool does not need (collective_rpc
    and the like).
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN, "")
        if not self._token:
            raise RuntimeError(
                f"{TOKEN} is not set: this server would let anybody replace its weights"
            )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = dict(scope.get("headers", [])).get(b"authorization", b"").decode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._token}"):
            await _refuse(send, 401, b"a token is needed")
        elif scope["type"] != "http" or scope["path"] not in ROUTES:
            await _refuse(send, 403, b"not a route of this pool")
        else:
            await self._app(scope, receive, send)


async def _refuse(send: Any, status: int, why: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": why})
