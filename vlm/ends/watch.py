"""The watch of a process: a thread that sees to it that the process ends, and says why, whatever its main thread does.

Signals, other ranks and time are seen here even while the main thread hangs in a collective, where no handler runs.
"""

import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from vlm.activity import activity
from vlm.ends.end import End, StoppedError, code_of, end_of, is_about_connection
from vlm.ends.hang import HANG, HangWatch
from vlm.ends.ranks import Meeting, Patience, Ranks
from vlm.ends.teller import Teller

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_SECONDS = 1.0  # terminal and launcher pass on one Ctrl-C, one after the other
_VERDICT_SECONDS = 5.0  # how long the cause of a broken connection is waited for
_HEARD_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # how long the main thread has to end by itself
_PAUSE = 3600.0


class Watch:
    """A context manager; inside, a signal raises StoppedError in the main thread, or is kept as a request.

    Only the main thread of a process can watch its signals; in another one, the ranks alone are watched.
    """

    def __init__(self) -> None:
        self.teller = Teller()
        self.ranks: Ranks | None = None
        self.request: int | None = None  # the signal that was kept
        self.stop_after: int | None = None  # the step after which all ranks stop, once agreed
        self.lost_now: Callable[[], str] = lambda: ""  # words on what an end at once loses
        self.hang: HangWatch | None = None
        self._keeps_requests = False
        self._first_signal: float | None = None
        self._signals: set[int] = set()
        self._deadline: float | None = None
        self._last_words: End | None = None  # to be told at the deadline, if nothing was
        self._is_over = False
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._ended_by_thread = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        with suppress(ValueError):  # not in the main thread
            self._wakeup_before = signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop_thread)
        self._thread.join(_GRACE_SECONDS)
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
        self._selector.close()
        self.close()

    def close(self) -> None:
        """Close what a process forked from this one must not hold open."""
        for connection in (self._wake_read, self._wake_write):
            connection.close()
        if self.ranks is not None:
            self.ranks.close()

    # Called by the main thread.

    def join(self, world: Meeting, patience: Patience) -> int:
        """Watch the other ranks too, each silent for at most `patience`; how many cannot be. Collective."""
        self.teller.set_rank(world.rank)
        if world.size == 1:
            return 0
        ranks = Ranks(world, patience, self._selector, self)
        lost = ranks.meet()
        if lost:  # a stop that only some ranks hear of would part them
            ranks.close()
            return lost
        self.ranks = ranks
        self._do(ranks.start)
        return 0

    @contextmanager
    def watching_for_hangs(self, hang: HangWatch | None) -> Iterator[None]:
        """See to it in the block that the work goes on; None: nobody looks."""
        activity.touch()
        self.hang = hang
        self._wake()
        try:
            yield
        finally:
            self.hang = None

    @contextmanager
    def keeping_requests(self) -> Iterator[None]:
        """Keep a first signal as a request in the block, for whoever asks; one that nobody answered ends it then."""
        self._keeps_requests = True
        try:
            yield
        finally:
            self._keeps_requests = False
        if self.request is not None:
            raise StoppedError(self.request)

    def report(self, error: BaseException) -> int:
        """Tell how an exception ends this process, here and to the other ranks, before it goes; the exit code."""
        if self.ranks is not None and is_about_connection(error):
            self._ended_by_thread.wait(_VERDICT_SECONDS)  # it may be the echo of another rank's end
        end = end_of(error)
        if self.teller.report(end, error) and self.ranks is not None:
            self._send_and_wait(lambda: self._ranks.announce(end))
            self._deadline = time.monotonic() + _GRACE_SECONDS
            self._wake()
        assert self.teller.reported is not None
        return self.teller.reported.code

    def leave(self) -> None:
        """Say to the other ranks that this one is done."""
        if self.ranks is not None:
            self._do(self._ranks.leave)

    def agree_to_stop(self, step: int) -> None:
        """Tell all ranks to stop after `step`, and return when all know it (rank 0)."""
        assert self.request is not None
        number = self.request
        self._send_and_wait(lambda: self._ranks.agree(step, number), seconds=_PAUSE)
        self.stop_after = step

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None
        return self.ranks

    def _send_and_wait(self, say: Callable[[], None], seconds: float = _HEARD_SECONDS) -> None:
        self._do(say)
        until = time.monotonic() + seconds
        while not self._ranks.is_heard and time.monotonic() < until:
            time.sleep(0.005)

    def _do(self, task: Callable[[], None]) -> None:
        """Have the thread do something, and wait for that."""
        done = threading.Event()

        def do() -> None:
            task()
            done.set()

        self._tasks.put(do)
        self._wake()
        done.wait(_HEARD_SECONDS)

    def _wake(self) -> None:
        with suppress(OSError):
            self._wake_write.send(b"\0")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        is_first, self.request = self.request is None, self.request or number
        if is_first and not self._keeps_requests and self.teller.reported is None:
            raise StoppedError(number)

    # Called by the thread.

    def _watch(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(self._seconds()):
                key.data()
            while not self._tasks.empty():
                self._tasks.get()()
            if self.ranks is not None:
                self.ranks.check()
            if self.hang is not None and self.teller.reported is None:
                self._look_for_hang(self.hang)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._leave_by_force()

    def _seconds(self) -> float:
        left = _PAUSE if self._deadline is None else self._deadline - time.monotonic()
        left = left if self.hang is None else min(left, self.hang.interval)
        return max(0.0, left if self.ranks is None else min(left, self.ranks.beat_seconds))

    def _look_for_hang(self, hang: HangWatch) -> None:
        """End where the work stands still: the main thread is given no time, for it is what hangs."""
        ranks = self.ranks
        line = hang.check(
            lambda: None if ranks is None else ranks.ask_for_reports(), lambda: {} if ranks is None else ranks.places()
        )
        if line is None:
            return
        end = End("hang", line, HANG)
        if self.teller.report(end) and ranks is not None:
            ranks.announce(end)
        self._end_at(time.monotonic() + _GRACE_SECONDS, end)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            for number in self._wake_read.recv(4096):
                if number in SIGNALS:
                    self._signalled(number)

    def _signalled(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            if not self._keeps_requests:
                self._end_at(now + _GRACE_SECONDS, end_of(StoppedError(number)))
            elif self.ranks is not None:
                self.ranks.ask_to_stop(number)
        elif now - self._first_signal > _SAME_SECONDS and (number == signal.SIGINT or number in self._signals):
            end = end_of(StoppedError(number, f"at once, at the second signal{self.lost_now()}"))
            self.teller.report(end)
            if self.ranks is not None:
                self.ranks.announce(end)
            self._leave_by_force()
        self._signals.add(number)

    def ended(self, end: End) -> None:
        """End because another rank did: the main thread finds its connections broken, or is ended where it hangs."""
        local_end = None if self.request is None else end_of(StoppedError(self.request))
        self.teller.report(local_end if local_end is not None and end.code == local_end.code else end)
        self._ended_by_thread.set()
        self._end_at(time.monotonic() + _GRACE_SECONDS, end)

    def _end_at(self, moment: float, end: End) -> None:
        self._deadline = moment if self._deadline is None else min(moment, self._deadline)
        self._last_words = self._last_words or end

    def stop_requested(self, number: int) -> None:  # noqa: D102
        self.request = self.request or number

    def agreed(self, step: int, number: int) -> None:  # noqa: D102
        self.request, self.stop_after = self.request or number, step

    def asked_for_report(self) -> dict[str, Any]:  # noqa: D102
        return {} if self.hang is None else dict(self.hang.report())

    def reported(self, report: dict[str, Any]) -> None:  # noqa: D102
        if self.hang is not None and report:
            self.hang.take(report)

    def _leave_by_force(self) -> None:
        if self._last_words is not None:
            self.teller.report(self._last_words)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(self.teller.reported.code if self.teller.reported is not None else code_of(signal.SIGTERM))

    def _stop_thread(self) -> None:
        self._is_over = True


_watch: Watch | None = None


@contextmanager
def watching() -> Iterator[Watch]:
    """This process's watch in the block: the one that is on, or a new one."""
    global _watch  # signals and forks are the whole process's
    if _watch is not None:
        yield _watch
        return
    with Watch() as _watch:
        try:
            yield _watch
        finally:
            _watch = None


def _close_in_child() -> None:
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        _watch.close()
        _watch = None


os.register_at_fork(after_in_child=_close_in_child)
