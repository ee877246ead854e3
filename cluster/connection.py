"""Joining the Ray cluster that a run belongs to."""

from __future__ import annotations

import logging
import os
import signal


def connect() -> None:
    """Join the cluster of this job or of RAY_ADDRESS (``auto`` is the one that was started here), or start our own.

    One of our own has token authentication on: Ray, from 2.60 on, makes the token where there is none yet. Nothing is
    joined unasked: what Ray remembers as the last cluster of this machine may be gone, and it would wait for that.
    """
    import ray

    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS", "local")
    dashboard = False if address == "local" else None  # others have theirs, or not
    ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process on the spot
