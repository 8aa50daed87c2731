"""Forked processes that work on numbers, each over a socket of its own on which nobody can be kept waiting for ever."""

import ctypes
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from multiprocessing.util import Finalize
from typing import Any

import torch

from vlm.errors import UserError

_LENGTH = struct.Struct("!Q")  # before each message, in bytes
_PR_SET_PDEATHSIG = 1
# A launcher or a terminal signals the whole group; what it means is the training process's to decide.
_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SECONDS_TO_DIE = 5.0


class WorkerDiedError(Exception):
    """A worker is gone, and said nothing."""


class Crew:
    """`size` processes, each calling `work(worker, number)` for the numbers it is sent, in order.

    Results travel by value: a process that is stopped in the midst of one holds nothing that another would wait for.
    """

    def __init__(self, work: Callable[[int, int], object], size: int) -> None:
        self._members = members = _Members()
        self.close = Finalize(self, members.end, exitpriority=10)
        context = get_context("fork")
        for worker in range(size):
            parent_end, worker_end = socket.socketpair()
            # Held back until the worker has said what it does with them.
            mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
            process = context.Process(
                target=_serve, args=(work, worker, worker_end, [*members.sockets, parent_end]), daemon=True
            )
            members.sockets.append(parent_end)
            process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
            worker_end.close()  # so that its end is seen here
            members.processes.append(process)

    def process(self, worker: int) -> int | None:
        """The number of a worker's process."""
        return self._members.processes[worker].pid

    def send(self, worker: int, number: int) -> None:
        """Ask a worker for one more result. Raises WorkerDiedError."""
        try:
            self._members.sockets[worker].sendall(_LENGTH.pack(number))
        except ConnectionError:
            raise WorkerDiedError from None

    def receive(self, worker: int, wait: Callable[[], float]) -> Any:
        """The next result of a worker.

        `wait` is asked again and again how many seconds to wait on, and raises when it has been long enough.

        Raises:
            WorkerDiedError: there will be none.
            Exception: as `work` raised it.
        """
        (length,) = _LENGTH.unpack(_read(self._members.sockets[worker], _LENGTH.size, wait))
        result = pickle.loads(_read(self._members.sockets[worker], length, wait))  # noqa: S301 - our own process wrote it
        if isinstance(result, _Raised):
            raise result.error
        return result


class _Members:
    """The processes, and this process's ends of their sockets."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.processes: list[ForkProcess] = []

    def end(self) -> None:
        """Close and kill: a worker holds nothing that a kill would spoil, and a stopped one heeds no other signal."""
        for parent_end in self.sockets:
            parent_end.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_SECONDS_TO_DIE)


class _Raised:
    """An exception on its way from a worker."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _ByValue(pickle.Pickler):
    """Sends tensors as their bytes: torch's own way hands over file descriptors, whose receipt waits for ever."""

    def reducer_override(self, value: Any) -> Any:
        """The function and arguments that make a tensor again."""
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _packed(result: object) -> bytes:
    room = BytesIO()
    _ByValue(room, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return room.getvalue()


def _read(end: socket.socket, size: int, wait: Callable[[], float]) -> bytearray:
    room = bytearray(size)
    left = memoryview(room)
    while left:
        end.settimeout(wait())
        try:
            count = end.recv_into(left)
        except TimeoutError:
            continue
        except ConnectionError:
            count = 0
        if count == 0:
            raise WorkerDiedError
        left = left[count:]
    return room


def _serve(work: Callable[[int, int], object], worker: int, end: socket.socket, others: list[socket.socket]) -> None:
    """A worker's life: until the training process closes its end, or ends."""
    _start(os.getppid())
    for other in others:
        other.close()
    try:
        while request := end.recv(_LENGTH.size, socket.MSG_WAITALL):
            (number,) = _LENGTH.unpack(request)
            answer = _packed(_result(work, worker, number))
            end.sendall(_LENGTH.pack(len(answer)))
            end.sendall(answer)
    except (ConnectionError, struct.error):
        return


def _result(work: Callable[[int, int], object], worker: int, number: int) -> object:
    try:
        return work(worker, number)
    except Exception as error:
        if not isinstance(error, UserError):  # that is told in one line
            error.add_note(f"in loading worker {worker}:\n{traceback.format_exc()}")
        raised = _Raised(error)
    try:
        pickle.loads(pickle.dumps(raised))  # noqa: S301 - not every exception survives the way
    except Exception as why:
        sendable = RuntimeError(f"{type(raised.error).__name__}: {raised.error} (and cannot be sent: {why})")
        return _Raised(sendable)
    return raised


def _start(parent: int) -> None:
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_THE_PARENT)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    if sys.platform == "linux":  # elsewhere the socket tells, after the piece of work at hand
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
