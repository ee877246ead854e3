"""Joining the Ray cluster that a run belongs to. An address that does not answer is refused after a few seconds."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import urllib.error
import urllib.request

from evolver.errors import BadInput, cause_of

ANSWER_SECONDS = 10.0
# How a client of HTTP/2, on which Ray's servers speak, begins: its greeting, and settings that change nothing.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def connect() -> None:
    """Join the cluster of this Ray job or of RAY_ADDRESS; where neither names one, start a cluster on this machine.

    ``RAY_ADDRESS=auto`` is the cluster that was started on this machine. A cluster that is started here has token
    authentication on; Ray creates the token where there is none yet (from Ray 2.60 on). No cluster is joined unless it
    is named, because Ray would otherwise try the last cluster of this machine, and wait for it even if it is gone.

    Raises BadInput for a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS") or "local"
    dashboard = False if address == "local" else None  # a cluster that is joined decides about its own dashboard
    try:
        if address != "local":
            _check_server(address if address != "auto" else _started_here(), address)
        ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise no_answer("RAY_ADDRESS", address, error) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # ray.init installs a handler that ends the process at once


def _started_here() -> str:
    """The address of the cluster that was started on this machine, which may have ended since then.

    Ray has no public function that tells this address without waiting for the cluster.

    Raises ConnectionError where no cluster was started.
    """
    from ray._private.services import get_ray_address_from_environment

    found: str = get_ray_address_from_environment("auto", None)
    return found


def check_dashboard(address: str) -> None:
    """Check that something answers at the address of a cluster's dashboard.

    Raises BadInput where nothing does.
    """
    try:
        if not address.startswith(("http://", "https://")):
            raise ValueError("it does not begin with http://")
        with contextlib.suppress(urllib.error.HTTPError):  # this is an answer, too
            urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise no_answer("--address", address, error) from error


def _check_server(address: str, given: str) -> None:
    """Raises BadInput where no server answers at ``host:port``; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not (host and port.isdigit()):
            raise ValueError("it is not a host and a port")
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as server:
            server.sendall(GREETING)
            server.recv(1)
    except (OSError, ValueError, OverflowError) as error:
        raise no_answer("RAY_ADDRESS", given, error) from error


def no_answer(key: str, address: str, error: Exception) -> BadInput:
    """The error for an address, given under ``key``, at which no cluster answers."""
    reason = getattr(error, "reason", None)  # urllib wraps what the system said
    error = reason if isinstance(reason, Exception) else error
    example = "http://127.0.0.1:8265" if key == "--address" else "127.0.0.1:6379"
    said = cause_of(error).rstrip(".")
    return BadInput(
        f"{key}: no Ray cluster answers at {address[:100]!r} ({said}); start the cluster, or write its address, such "
        f"as {example}."
    )
