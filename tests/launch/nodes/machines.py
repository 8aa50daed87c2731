"""Two machines of one: network namespaces with addresses of their own, and a link between them that can be cut."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

IP = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")


def no_machines() -> str | None:
    """Why there can be none here; None where there can."""
    if IP is None:
        return "no program `ip` (iproute2) is here"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    done = subprocess.run([IP, "netns", "add", f"vlm-try-{os.getpid()}"], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces are not permitted here: {done.stderr.strip()}"
    subprocess.run([IP, "netns", "delete", f"vlm-try-{os.getpid()}"], check=True)
    return None


@dataclass(frozen=True)
class Machine:
    """One namespace, its interface and address."""

    space: str
    device: str
    address: str

    def enter(self) -> None:
        """Put this process into it."""
        with Path(f"/var/run/netns/{self.space}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"no way into {self.space}")

    def link(self, state: str) -> None:
        """Take this end of the link "down" or "up"."""
        _ip("-n", self.space, "link", "set", self.device, state)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two that see each other, and nothing else."""
    own = os.getpid()
    first, second = (Machine(f"vlm-{own}-{n}", f"vlm{n}", f"10.77.0.{n}") for n in (1, 2))
    try:
        for machine in (first, second):
            _ip("netns", "add", machine.space)
        peer = ("type", "veth", "peer", "name", second.device, "netns", second.space)
        _ip("link", "add", first.device, "netns", first.space, *peer)
        for machine in (first, second):
            _ip("-n", machine.space, "addr", "add", f"{machine.address}/24", "dev", machine.device)
            _ip("-n", machine.space, "link", "set", "lo", "up")
            machine.link("up")
        yield first, second
    finally:
        for machine in (first, second):
            subprocess.run([str(IP), "netns", "delete", machine.space], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run([str(IP), *words], check=True, capture_output=True)
