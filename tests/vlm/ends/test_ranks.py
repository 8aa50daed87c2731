"""Bytes that strangers send to the ranks' own port end nothing but their connection."""

import json
import selectors
import socket
from dataclasses import dataclass
from typing import Any

import pytest

from vlm.ends.end import End
from vlm.ends.ranks import Patience, Ranks


@dataclass
class Alone:
    """Rank 0 of two, before the other has come."""

    rank: int = 0
    size: int = 2
    is_main: bool = True
    address: Any = None

    def gather_objects(self, value: Any) -> list[Any]:
        self.address = self.address or value
        return [value]


class Deaf:
    """Nobody should be told anything."""

    def ended(self, end: End) -> None:
        raise AssertionError(end)

    def stop_requested(self, number: int) -> None:
        raise AssertionError(number)

    def agreed(self, step: int, number: int) -> None:
        raise AssertionError(step)

    def asked_for_report(self) -> dict[str, Any]:
        raise AssertionError

    def reported(self, report: dict[str, Any]) -> None:
        raise AssertionError(report)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\n",
        json.dumps({"hello": 1, "token": "\u00e9"}, ensure_ascii=False).encode() + b"\n",
        json.dumps({"end": {"rank": 1}}).encode() + b"\n",
        b"[" * 60_000 + b"\n",
    ],
    ids=["http", "no text", "other letters", "no token", "deep"],
)
def test_a_stranger_is_dropped(said: bytes) -> None:
    world, selector = Alone(), selectors.DefaultSelector()
    ranks = Ranks(world, Patience(60), selector, Deaf())
    ranks.meet()
    ranks.start()
    with socket.create_connection(("127.0.0.1", world.address[1]), timeout=10) as stranger:
        stranger.sendall(said)
        stranger.settimeout(0)
        for _ in range(5):  # it is accepted, heard, and let go of
            for key, _events in selector.select(1):
                key.data()
            try:
                if not stranger.recv(1):
                    break
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
        else:
            raise AssertionError("still connected")
    ranks.close()
    selector.close()
