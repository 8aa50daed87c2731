"""How the ranks of a run hear of each other's end: every rank's watching thread holds a connection to rank 0's.

Each says every few moments that it is there. A rank that fails says why before it goes; one that was killed is known by
its connection, which closes; one that is stopped or cut off by its silence. Rank 0 passes on what happened first, and
if it is rank 0 itself, all others see that by themselves.
"""

import hmac
import os
import secrets
import selectors
import socket
import time
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vlm.ends.end import FAILURE, End
from vlm.ends.wire import Wire

_LEAST_PATIENCE = 2.0  # seconds; a busy machine keeps a thread waiting as long
_LONGEST_BEAT = 10.0
_CONNECT_SECONDS = 10.0


class Patience(NamedTuple):
    """The seconds that a rank may be silent, and the key or option that sets them."""

    seconds: float
    option: str = "data.patience"


@runtime_checkable
class Meeting(Protocol):
    """The part of a `World` that is used here, without torch."""

    @property
    def rank(self) -> int:
        """This process's place."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value. Collective."""


@runtime_checkable
class Listener(Protocol):
    """Who is told what comes from other ranks."""

    def ended(self, end: End) -> None:
        """This rank ends, because another did; said once."""

    def stop_requested(self, number: int) -> None:
        """Some rank got this signal, by which all are to stop; said to rank 0."""

    def agreed(self, step: int, number: int) -> None:
        """Rank 0 says after which step all ranks stop."""

    def asked_for_report(self) -> dict[str, Any]:
        """Rank 0 asks what this rank is doing."""

    def reported(self, report: dict[str, Any]) -> None:
        """A rank says what it is doing; said to rank 0."""


class Ranks:
    """This rank's connections; all but the making of them belongs to the watching thread."""

    def __init__(
        self, world: Meeting, patience: Patience, selector: selectors.BaseSelector, listener: Listener
    ) -> None:
        self.world = world
        self._listener = listener
        self._patience = max(_LEAST_PATIENCE, patience.seconds)
        self._patience_option = patience.option
        self.beat_seconds = min(_LONGEST_BEAT, self._patience / 5)
        self._selector = selector
        self._wires: list[Wire] = []
        self._first: dict[str, Any] | None = None  # what ended first, and is passed on
        self._unheard: set[int] = set()
        self._server: socket.socket | None = None
        self._token = ""
        self._checked = time.monotonic()
        self._beaten = 0.0

    def meet(self) -> int:
        """Connect to rank 0; how many ranks could not. Collective, before `start`."""
        address: tuple[str, int, str] | None = None
        if self.world.is_main:
            self._server = socket.create_server(("", 0), family=socket.AF_INET, backlog=self.world.size)
            self._server.setblocking(False)
            address = (socket.gethostname(), self._server.getsockname()[1], secrets.token_hex(16))
        host, port, self._token = self.world.gather_objects(address)[0]
        is_there = self.world.is_main or self._connect(host, port)
        return self.world.gather_objects(is_there).count(False)

    def start(self) -> None:
        """Begin to listen to the others."""
        if self._server is not None:
            self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        for wire in self._wires:
            self._selector.register(wire.socket, selectors.EVENT_READ, partial(self._receive, wire))

    def _connect(self, host: str, port: int) -> bool:
        for name in (os.environ.get("MASTER_ADDR", host), host):
            try:
                connection = socket.create_connection((name, port), timeout=_CONNECT_SECONDS)
            except OSError:
                continue
            wire = Wire(connection, rank=0)
            wire.where = f" on {host}"
            self._wires.append(wire)
            wire.send(hello=self.world.rank, token=self._token, host=socket.gethostname(), pid=os.getpid())
            return True
        return False

    def _accept(self) -> None:
        assert self._server is not None
        try:
            wire = Wire(self._server.accept()[0])
        except OSError:
            return
        self._wires.append(wire)
        self._selector.register(wire.socket, selectors.EVENT_READ, partial(self._receive, wire))

    def _receive(self, wire: Wire) -> None:
        messages, is_there = wire.receive()
        for message in messages:
            if wire.rank is None and not self._knows(wire, message):
                is_there = False
                break
            self._take(wire, message)
        if not is_there:
            self._drop(wire)

    def _knows(self, wire: Wire, hello: dict[str, Any]) -> bool:
        """Whether this is one of our ranks: it knows the word that only they were told."""
        if not hmac.compare_digest(ascii(hello.get("token")), ascii(self._token)):
            return False
        wire.rank = int(hello["hello"])
        wire.where = f" on {hello.get('host')} (process {hello.get('pid')})"
        return True

    def _take(self, wire: Wire, message: dict[str, Any]) -> None:
        if "end" in message:
            wire.is_leaving = wire.is_leaving or message["end"]["rank"] == wire.rank
            wire.send(heard=self.world.rank)
            self._begin_end(message["end"])
        elif "heard" in message:
            self._unheard.discard(message["heard"])
        elif "bye" in message:
            wire.is_leaving = True
        elif "stop" in message:
            self._listener.stop_requested(int(message["stop"]))
        elif "stop_after" in message:
            self._listener.agreed(int(message["stop_after"]), int(message["signal"]))
            wire.send(heard=self.world.rank)
        elif "doing" in message:
            wire.send(done=self._listener.asked_for_report())
        elif "done" in message:
            self._listener.reported(message["done"])

    def ask_for_reports(self) -> None:
        """Ask all other ranks what they are doing (rank 0)."""
        for wire in self._wires:
            wire.send(doing=True)

    def places(self) -> dict[int, str]:
        """Where the ranks are that this one is connected to."""
        return {wire.rank: wire.where for wire in self._wires if wire.rank is not None}

    def _drop(self, wire: Wire) -> None:
        self._wires.remove(wire)
        self._selector.unregister(wire.socket)
        wire.socket.close()
        if wire.rank is not None:
            self._unheard.discard(wire.rank)
            if not wire.is_leaving:
                self._lose(wire, "is gone without a word: killed, or out of memory?")

    def _lose(self, wire: Wire, how: str) -> None:
        wire.is_leaving = True
        self._begin_end(
            {"rank": wire.rank, "kind": "lost", "message": f"rank {wire.rank}{wire.where} {how}", "code": FAILURE}
        )

    def _begin_end(self, first: dict[str, Any]) -> None:
        """Another rank ended: pass on what was the first end, and end."""
        if self._first is not None:
            return
        self._first = first
        if self.world.is_main:
            self._pass_on(end=first)
        message = (
            str(first["message"]) if first["kind"] == "lost" else f"rank {first['rank']} ended: {first['message']}"
        )
        self._listener.ended(End("lost", message, int(first["code"])))

    def _pass_on(self, **message: Any) -> None:
        for wire in self._wires:
            if wire.rank is not None and not wire.is_leaving:
                self._unheard.add(wire.rank)
                wire.send(**message)

    def announce(self, end: End) -> None:
        """Say that this rank ends, and why. `is_heard` tells when the others know."""
        if end.agreed:
            self.leave()
        elif self._first is None:
            self._first = {"rank": self.world.rank, "kind": end.kind, "message": end.message, "code": end.code}
            self._pass_on(end=self._first)

    def leave(self) -> None:
        """Say that this rank is done and that nothing is wrong."""
        self._first = self._first or {}
        for wire in self._wires:
            wire.send(bye=True)
            wire.is_leaving = True

    def ask_to_stop(self, number: int) -> None:
        """Tell rank 0 that this rank was asked to stop."""
        if self.world.is_main:
            self._listener.stop_requested(number)
        for wire in self._wires:
            if not self.world.is_main:
                wire.send(stop=number)

    def agree(self, step: int, number: int) -> None:
        """Tell all other ranks after which step all stop (rank 0). `is_heard` tells when all know."""
        self._pass_on(stop_after=step, signal=number)

    @property
    def is_heard(self) -> bool:
        """Whether all that were told something have said that they know."""
        return not self._unheard

    def check(self) -> None:
        """Say that this rank is there, and see who has been silent for too long."""
        now = time.monotonic()
        if now - self._checked > 2 * self.beat_seconds + 1:  # this process itself was stopped for a while
            for wire in self._wires:
                wire.heard = now
        self._checked = now
        if now - self._beaten >= self.beat_seconds:
            self._beaten = now
            for wire in self._wires:
                wire.send(beat=1)
        for wire in self._wires:
            silent = now - wire.heard
            if wire.rank is not None and not wire.is_leaving and silent > self._patience:
                self._lose(wire, f"has been silent for {silent:.0f} s ({self._patience_option}): stopped, or cut off?")

    def close(self) -> None:
        """Let go of all connections."""
        for connection in [self._server, *(wire.socket for wire in self._wires)]:
            if connection is not None:
                connection.close()
        self._wires = []
