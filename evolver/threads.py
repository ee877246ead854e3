"""Threads that compute: how they wait, and how many of them a process may run at a time.

The threads of OpenMP, which torch computes with, wait for each other many times in one forward pass. By default they
spin while they wait: on an idle machine nobody notices, but beside another busy process every wait burns the core that
the awaited thread needs, and a candidate takes ten times as long. A short spin and then sleep costs the idle case
nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

# GCC's runtime, which torch's Linux builds bring along, counts turns of its loop; LLVM's and Intel's, milliseconds.
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
# The standard's own switch, for all runtimes. Whoever sets it has decided.
STANDARD = "OMP_WAIT_POLICY"
CGROUPS = Path("/sys/fs/cgroup")


def waiting(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the runtimes are told of how threads wait, by variable: what the user has set, else a short spin."""
    chosen = {name: environment[name] for name in (*SHORT_SPIN, STANDARD) if name in environment}
    return chosen if STANDARD in chosen else {**SHORT_SPIN, **chosen}


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the threads of this process, and of those that it starts, sleep after a short spin.

    The runtimes read it when they are loaded, so it has to be called before torch is imported. What the user has set
    stays as it is.
    """
    environment.update(waiting(environment))


def usable_cores() -> int:
    """How many cores this process may use: those of its affinity mask, within the quota of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) or 1 for quota in _quotas())]))


def too_many(threads: int) -> str | None:
    """What to tell the user where a worker has more threads than it may use cores; None where it has not."""
    cores = usable_cores()
    if threads <= cores:
        return None
    return (
        f"evaluation.threads is {threads}, and this process may use {cores} core{'s' * (cores > 1)}: threads that "
        f"share a core wait for each other; a new run with evaluation.threads: {cores} will be faster, while this one "
        "keeps what it was made with"
    )


def _quotas() -> Iterator[float]:
    """The cores that every control group above this process allows, where it allows less than all."""
    with contextlib.suppress(OSError):  # no Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = CGROUPS / "cpu" if controllers else CGROUPS
                place = root / path.lstrip("/")
                yield from (q for at in (place, *place.parents) if at.is_relative_to(root) and (q := _quota(at)))


def _quota(group: Path) -> float | None:
    """The cores that one control group allows; None where it says nothing, or allows all."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
        quota, period = (int(part) for part in (group / "cpu.max").read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):  # the first version of control groups
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
