"""Protects every route of a server with a token. Runs inside the server.

vLLM's API key protects only /v1 and /inference. Without the guard, the routes that change weights
or pause the engine would be open to every client that can connect to the port.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

TOKEN_VARIABLE = "GRPO_ENGINE_TOKEN"  # environment variable that holds the token
# The routes that a pool uses.
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


class Guard:
    """ASGI middleware (vLLM's `--middleware`) that checks the token and the route of a request.

    A request without the token gets status 401. A route that a pool does not use, for example
    /collective_rpc, gets status 403.
    """

    def __init__(self, app: Any) -> None:
        """Wraps the ASGI app of the server. Raises RuntimeError if the token is not set."""
        self._app = app
        token = os.environ.get(TOKEN_VARIABLE, "")
        # Bytes: a header may contain any, and compare_digest rejects text that is not ASCII.
        self._authorization = f"Bearer {token}".encode()
        if not token:
            raise RuntimeError(
                f"{TOKEN_VARIABLE} is not set: without a token, any client could replace the "
                "weights of this server"
            )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes an authorized request to the app and rejects any other request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope.get("headers", []))
        authorization = headers.get(b"authorization", b"")
        if not hmac.compare_digest(authorization, self._authorization):
            await _reject(send, 401, b"missing or wrong token")
        elif scope["type"] != "http" or scope["path"] not in ROUTES:
            await _reject(send, 403, b"route not allowed")
        else:
            await self._app(scope, receive, send)


async def _reject(send: Any, status: int, reason: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": reason})
