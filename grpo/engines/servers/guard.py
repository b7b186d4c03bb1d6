"""Guards every route of a server with a token. Runs inside the server.

vLLM's own key guards /v1 and /inference only: the routes that change weights or pause the engine
would be open to everybody who reaches the port.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

TOKEN_VARIABLE = "GRPO_ENGINE_TOKEN"  # the environment variable of the token
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
    """ASGI middleware (`--middleware`).

    Answers 401 to a request without the token, and 403 for a route that a pool does not need
    (collective_rpc and the like).
    """

    def __init__(self, app: Any) -> None:
        """Wraps the server's app. Raises RuntimeError if the token is not set."""
        self._app = app
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not self._token:
            raise RuntimeError(
                f"{TOKEN_VARIABLE} is not set: this server would let anybody replace its weights"
            )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request with the token to the app, refuses any other."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope.get("headers", []))
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if not hmac.compare_digest(authorization, f"Bearer {self._token}"):
            await _refuse(send, 401, b"a token is needed")
        elif scope["type"] != "http" or scope["path"] not in ROUTES:
            await _refuse(send, 403, b"not a route of this pool")
        else:
            await self._app(scope, receive, send)


async def _refuse(send: Any, status: int, reason: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": reason})
