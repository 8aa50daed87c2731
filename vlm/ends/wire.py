"""A connection between two ranks' watching threads: small messages in JSON, each on a line, never waited for."""

import json
import socket
import time
from typing import Any

_LONGEST = 65_536  # bytes without the end of a line: whoever sends that is none of ours


class Wire:
    """One end; `rank` is who is at the other, None until it said so."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.rank = rank
        self.where = ""
        self.heard = time.monotonic()
        self.is_leaving = False  # it said goodbye: that it falls silent means nothing any more
        self._read = b""

    def send(self, **message: Any) -> None:
        """Send, or let it be: whoever reads nothing for so long that this does not fit is found by its silence."""
        try:
            self.socket.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether the other end is still there."""
        there = True
        try:
            while received := self.socket.recv(_LONGEST):
                self._read += received
            there = False
        except BlockingIOError:
            pass
        except OSError:
            there = False
        *lines, self._read = self._read.split(b"\n")
        if len(self._read) > _LONGEST:
            return [], False
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return [], False
        if lines:
            self.heard = time.monotonic()
        return [message for message in messages if isinstance(message, dict)], there
