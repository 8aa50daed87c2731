"""Where the nodes of a job meet, and by which address and interface of this node the others are reached."""

import re
import socket
from dataclasses import dataclass

import psutil

from vlm.errors import UserError
from vlm.paths import shown

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True)
class Meeting:
    """The host and port of the node at which all nodes meet."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Meeting":
        """What `HOST:PORT` says. Raises UserError."""
        host, colon, port = text.rpartition(":")
        if not colon or not _HOST.fullmatch(host) or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65_536:
            raise UserError(f"--meet: {shown(text)} is no HOST:PORT; the first node's name, and a port from 1 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Here:
    """This node as the others see it: whether they meet here, its address, and the interface that has it."""

    is_host: bool
    address: str
    interface: str | None


def here(meeting: Meeting) -> Here:
    """This node's place on the way to the meeting. Raises OSError where the host's name, or a way to it, is unknown.

    A host may know itself by a loopback address that means another machine elsewhere (Debian's 127.0.1.1): it is then
    known to the others by the name that they were told.
    """
    family, kind, _, _, target = socket.getaddrinfo(meeting.host.strip("[]"), meeting.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing; the system chooses the way
        own = str(probe.getsockname()[0])
    is_host = own == target[0] or _is_loopback(own)
    if _is_loopback(own) and not _is_loopback(meeting.host) and meeting.host != "localhost":
        return Here(is_host, meeting.host, None)
    return Here(is_host, own, _interface(own))


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _interface(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if any(one.address == address for one in known)), None)
