"""Ports and addresses of this machine."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def free_port() -> int:
    """Returns a TCP port that is free on 127.0.0.1 at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def address_towards(url: str) -> str:
    """Returns the address of this machine on its network route to `url`'s host."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])
