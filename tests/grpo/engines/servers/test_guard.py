"""The guard of a server's routes, called as an ASGI app without a server."""

import asyncio

import pytest

from grpo.engines.servers.guard import TOKEN_VARIABLE, Guard


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status_of(authorization, path="/health"):
    """Returns the status of a request with this header."""
    messages = []

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"authorization", authorization)]}
    asyncio.run(Guard(app)(scope, None, send))
    return messages[0]["status"]


@pytest.mark.parametrize("token", ["secret", "gehéim"])
def test_only_the_token_opens_the_routes_of_a_pool(monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    assert status_of(f"Bearer {token}".encode()) == 200
    assert status_of(f"Bearer {token}".encode(), path="/collective_rpc") == 403
    assert status_of(b"") == 401


@pytest.mark.parametrize(
    "authorization", ["Bearer gehéim".encode("latin-1"), b"\xff\xfe", b"Bearer"]
)
def test_a_header_of_any_bytes_is_rejected_without_an_exception(monkeypatch, authorization):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert status_of(authorization) == 401
