"""Network ports and addresses of this machine."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def free_port() -> int:
    """Returns a TCP port that is currently free on 127.0.0.1."""
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        return int(bound_socket.getsockname()[1])


def address_towards(url: str) -> str:
    """Returns the IPv4 address of this machine on its network route to the host of `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        udp_socket.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends no packet
        return str(udp_socket.getsockname()[0])
