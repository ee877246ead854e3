"""Finds out which nodes can be reached.

Ray finds it out as well, but takes minutes where a broken network drops packets without an error.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

# Every node is asked every PULSE_SECONDS. It counts as lost after it has not answered MISSES times in a row.
PULSE_SECONDS = 5.0
MISSES = 3
CONNECT_SECONDS = 2.0
PULSES_AT_ONCE = 32


def is_alive(node: Mapping[str, Any]) -> bool:
    """Whether Ray's daemon on a node can be reached.

    Args:
        node: as ``ray.nodes()`` describes it.
    """
    if not node["Alive"]:
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class Pulse:
    """Asks all nodes of the cluster every PULSE_SECONDS, in a thread of its own, until it is closed."""

    def __init__(self) -> None:
        self._misses: dict[str, int] = {}
        self._end = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def lost(self, node: str) -> bool:
        """Whether the node with this id has not answered the last MISSES times."""
        return self._misses.get(node, 0) >= MISSES

    def close(self) -> None:
        """Stop asking."""
        self._end.set()

    def _beat(self) -> None:
        with ThreadPoolExecutor(PULSES_AT_ONCE) as pool:
            while not self._end.wait(PULSE_SECONDS) and ray.is_initialized():
                nodes = ray.nodes()
                for node, well in zip(nodes, pool.map(is_alive, nodes), strict=True):
                    self._misses[node["NodeID"]] = 0 if well else self._misses.get(node["NodeID"], 0) + 1
