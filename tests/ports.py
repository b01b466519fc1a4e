"""Ports for daemons that are to come back where they were."""

import random
import socket
from pathlib import Path

_reserved: list[socket.socket] = []
"""Bound as long as this process runs, and never listening: a daemon may listen at their ports, as often as it starts,
and no other test, nor one of another process, is given them."""


def free_port() -> int:
    """A port for a process that is to keep it across restarts, from below those that the kernel deals out itself. It
    stays this process's: until its daemon has bound it, and while that is down, no other test's may take it."""
    dealt_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(min(10_000, dealt_from // 2), dealt_from)
        sock = socket.socket()
        try:
            sock.bind(("127.0.0.1", port))  # fails where another has reserved it
        except OSError:
            sock.close()
            continue
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemon does
        _reserved.append(sock)
        return port
