"""Machines on this machine: network namespaces with an address each, on a bridge, so that links can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

import psutil

BRIDGE, NET = "evolver0", "10.177.0"


def ip(*words: str) -> bool:
    """Whether a command of iproute2 went well."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False).returncode == 0


def able() -> bool:
    """Whether this machine lets us make networks."""
    made = shutil.which("ip") is not None and os.geteuid() == 0 and ip("netns", "add", "evolver-try")
    return made and ip("netns", "del", "evolver-try")


class Network:
    """A bridge, with this machine at ``10.177.0.1`` and others, by number, at ``10.177.0.10 + number``."""

    def __init__(self) -> None:
        self.machines: list[int] = []
        self.close()  # what a killed test has left
        assert ip("link", "add", BRIDGE, "type", "bridge")
        assert ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        assert ip("link", "set", BRIDGE, "up")

    def add(self, number: int) -> str:
        """One more machine; its address."""
        space, inner, outer, address = f"evolver{number}", f"evin{number}", f"evout{number}", f"{NET}.{10 + number}"
        assert ip("netns", "add", space)
        self.machines.append(number)
        assert ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        assert ip("link", "set", inner, "netns", space)
        assert ip("link", "set", outer, "master", BRIDGE)
        assert ip("link", "set", outer, "up")
        for device in ("lo", inner):
            assert ip("-n", space, "link", "set", device, "up")
        assert ip("-n", space, "addr", "add", f"{address}/24", "dev", inner)
        assert ip("-n", space, "route", "add", "default", "via", f"{NET}.1")
        return address

    def on(self, number: int, command: Sequence[str]) -> list[str]:
        """A command as a machine's own."""
        return ["ip", "netns", "exec", f"evolver{number}", *command]

    def cut(self, number: int) -> None:
        """Pull its cable: packets vanish without a word."""
        assert ip("link", "set", f"evout{number}", "down")

    def kill(self, number: int) -> None:
        """Switch it off: all of its processes at once."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"evolver{number}"], capture_output=True, text=True, check=False
        )
        for pid in map(int, listed.stdout.split()):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Remove it all, and every process that has to do with it."""
        for number in range(1, 10):
            self.kill(number)
            ip("netns", "del", f"evolver{number}")
        for process in psutil.process_iter(["cmdline"]):
            if f"{NET}." in " ".join(process.info["cmdline"] or ()):
                process.kill()
        ip("link", "del", BRIDGE)
        self.machines.clear()
