"""Joining the Ray cluster that a run belongs to."""

from __future__ import annotations

import logging
import os
import signal


def connect() -> None:
    """Join the cluster of this Ray job or of RAY_ADDRESS; where neither names one, start a cluster on this machine.

    ``RAY_ADDRESS=auto`` is the cluster that was started on this machine. A cluster that is started here has token
    authentication on; Ray creates the token where there is none yet (from Ray 2.60 on). No cluster is joined unless it
    is named, because Ray would otherwise try the last cluster of this machine, and wait for it even if it is gone.
    """
    import ray

    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS", "local")
    dashboard = False if address == "local" else None  # a cluster that is joined decides about its own dashboard
    ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    signal.signal(signal.SIGTERM, handler)  # ray.init installs a handler that ends the process at once
