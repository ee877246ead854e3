"""The socket on which the dashboard listens."""

from __future__ import annotations

import socket

from evolver.errors import BadInput, cause_of


def listener_at(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Raises BadInput where it cannot; no name at all is refused, too, as it would mean every address of the machine.
    """
    try:
        if not host.strip():
            raise ValueError("the name is empty")
        return socket.create_server((host, port))
    except (OSError, ValueError, OverflowError) as error:
        said = cause_of(error).partition(" (while")[0]  # Python adds the address, which the sentence has already
        raise BadInput(
            f"--host, --port: the dashboard cannot listen on {host[:100]!r}, port {port} ({said}); name an "
            "address of this machine and a port that is free, such as --host 127.0.0.1 --port 0."
        ) from error
