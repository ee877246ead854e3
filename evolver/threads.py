"""Compute threads: how they wait for each other, and how many cores a process may use.

Torch computes with OpenMP threads, which wait for each other many times in one forward pass. By default a waiting
thread spins, that is, it keeps its core busy. On an idle machine this does no harm. Beside another busy process, the
spinning thread occupies the core that the awaited thread needs, and a candidate takes ten times as long. Threads that
spin for a short time and then sleep avoid this, and they are as fast on an idle machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from threadpoolctl import ThreadpoolController

# GCC's OpenMP runtime, which torch's Linux builds contain, counts turns of its loop; LLVM's and Intel's, milliseconds.
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
# The variable of the OpenMP standard, which all runtimes read. A user who sets it has made the choice.
STANDARD = "OMP_WAIT_POLICY"
CGROUPS = Path("/sys/fs/cgroup")


def waiting(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that say how threads wait: what the user has set, else a short spin."""
    chosen = {name: environment[name] for name in (*SHORT_SPIN, STANDARD) if name in environment}
    return chosen if STANDARD in chosen else {**SHORT_SPIN, **chosen}


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make the threads of this process, and of the processes that it starts, sleep after a short spin.

    Call this before torch is imported, because the OpenMP runtimes read the environment when they are loaded. Variables
    that the user has set are not changed.
    """
    environment.update(waiting(environment))


def single_thread() -> contextlib.AbstractContextManager[object]:
    """While this is open, NumPy and SciPy compute their matrix products and decompositions on one core.

    The small matrices of a search are faster so, above all beside busy workers, and sums are rounded alike on machines
    with any number of cores.
    """
    limited: contextlib.AbstractContextManager[object] = _libraries().limit(limits=1)
    return limited


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries with threads that are loaded; it takes a millisecond to look for them."""
    import scipy.linalg  # noqa: F401  # its library has to be loaded to be found

    return ThreadpoolController()


def usable_cores() -> int:
    """The number of cores that this process may use, by its affinity mask and the quotas of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) or 1 for quota in _quotas())]))


def too_many(threads: int) -> str | None:
    """A warning if a worker has more threads than cores that it may use; None if it has not."""
    cores = usable_cores()
    if threads <= cores:
        return None
    return (
        f"evaluation.threads is {threads}, but this process may use only {cores} core{'s' * (cores > 1)}, so threads "
        f"have to wait for each other; a new run with evaluation.threads: {cores} will be faster (the number cannot "
        "change within a run)"
    )


def _quotas() -> Iterator[float]:
    """The number of cores that each control group of this process allows; groups without a limit are left out."""
    with contextlib.suppress(OSError):  # not on Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = CGROUPS / "cpu" if controllers else CGROUPS
                place = root / path.lstrip("/")
                yield from (q for at in (place, *place.parents) if at.is_relative_to(root) and (q := _quota(at)))


def _quota(group: Path) -> float | None:
    """The number of cores that one control group allows; None if it sets no limit."""
    with contextlib.suppress(OSError, ValueError):  # the quota "max" means no limit
        quota, period = (int(part) for part in (group / "cpu.max").read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):  # control groups, version 1
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
