"""Network ports and addresses of this machine."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

# Where the processes of one machine reach each other. Without these variables, vLLM and gloo look
# for an address of this machine: vLLM in the route to a public server, gloo in the host name. On a
# machine without a network both fail or wait for a name server.
LOOPBACK_VARIABLES = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    """Returns a TCP port that is currently free on 127.0.0.1."""
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        return int(bound_socket.getsockname()[1])


def use_loopback() -> None:
    """Makes the processes of this machine use its loopback interface.

    Call it only if all ranks of the learner are on this machine. Variables that are set remain.
    """
    for name, value in LOOPBACK_VARIABLES.items():
        os.environ.setdefault(name, value)


def local_address_for(url: str) -> str:
    """Returns the IPv4 address of this machine on its network route to the host of `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        udp_socket.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends no packet
        return str(udp_socket.getsockname()[0])
