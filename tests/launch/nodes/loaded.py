"""A `vlm` program that starts at once: what a launcher starts is real, but its libraries are loaded already.

So may the launchers be that are Python programs themselves, and a `python` that runs modules by `-m`.
A program is a few lines that know no library. It asks the test's process, which forks a process with everything in
place from the server of `tests.ranks`: with the asking process's arguments, environment, output, folder and network.
Signals to the program reach that process, and its end is the program's own.
"""

import ctypes
import json
import os
import runpy
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

from launch.main import run
from tests.ranks import _CONTEXT

PACE = "VLM_TEST_PACE"
"""The variable that names a file with the seconds that a step is to take at least."""
_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({path!r})
words = json.dumps([os.getpid(), {module!r}, sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
asked.sendall(len(words).to_bytes(4, "big") + words)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: asked.send(bytes([number])))
answer = asked.recv(2)
code = int.from_bytes(answer, "big", signed=True) if answer else 70
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code % 256)
"""


LAUNCHERS = {
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
    "deepspeed": "deepspeed.launcher.runner",
    "python": "",  # that which its `-m` names
}
"""Programs of other packages, and the modules that they are."""


class LoadedPrograms:
    """The processes that were started; `folder` holds the programs, and goes first on a PATH.

    `commands` has the arguments and variables of each `vlm`. `modules` are more programs, by the module that each is.
    """

    def __init__(self, folder: Path, modules: Mapping[str, str]) -> None:
        self.folder = folder
        self.commands: list[tuple[list[str], dict[str, str]]] = []
        self._processes: list[ForkServerProcess] = []
        folder.mkdir()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / "asked"))
        self._server.listen(64)
        for name, module in {"vlm": None, **modules}.items():
            text = _PROGRAM.format(python=sys.executable, path=str(folder / "asked"), module=module)
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def path(self) -> str:
        """The PATH on which the program goes before all others."""
        return f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def running(self) -> list[ForkServerProcess]:
        """Those that have not ended."""
        return [process for process in self._processes if process.exitcode is None]

    def close(self) -> None:
        """Kill what is left."""
        self._server.close()
        for process in self.running():
            process.kill()
            process.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        size = int.from_bytes(_received(connection, 4), "big")
        pid, module, arguments, environment, folder = json.loads(_received(connection, size))
        if module is None:
            self.commands.append((arguments, environment))
        asked = (pid, self.folder, module, arguments, environment, folder)
        process = _CONTEXT.Process(target=_live, args=asked, daemon=False)
        process.start()
        self._processes.append(process)
        passing = threading.Thread(target=_pass_signals, args=(connection, process), daemon=True)
        passing.start()
        process.join()
        with suppress(OSError):
            connection.send((process.exitcode or 0).to_bytes(2, "big", signed=True))
            connection.shutdown(socket.SHUT_RDWR)
        passing.join()
        connection.close()


def _received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _pass_signals(connection: socket.socket, process: ForkServerProcess) -> None:
    """Signals go on to the process; a program that was killed takes it along."""
    try:
        while number := connection.recv(1):
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number[0])
        if process.exitcode is None:
            process.kill()
    except OSError:
        return


def _live(
    pid: int, programs: Path, module: str | None, arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    import torch

    with open(f"/proc/{pid}/ns/net") as namespace:
        if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "no way into the network of the program")
    for number in (1, 2):
        os.dup2(os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if PACE in environment:
        _pace(Path(environment[PACE]))
    if module is not None:
        _run_module(module, arguments, programs / "python")
    sys.argv = [str(programs / "vlm"), *arguments]
    run()


def _run_module(module: str, arguments: list[str], python: Path) -> NoReturn:
    """Be a program that a module is; what it starts by its interpreter is loaded too."""
    if not module:
        at = arguments.index("-m")
        module, arguments = arguments[at + 1], arguments[at + 2 :]
    sys.argv, sys.executable = [module, *arguments], str(python)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _pace(file: Path) -> None:
    """Let each step of this process take as long as the file says, at the time."""
    from vlm.training.trainer import Trainer

    take_step = Trainer._take_step

    def take_slowly(self: Trainer, *batch: Any) -> Any:
        time.sleep(float(file.read_text()))
        return take_step(self, *batch)

    Trainer._take_step = take_slowly  # type: ignore[assignment,method-assign]


@contextmanager
def loaded_programs(folder: Path, modules: Mapping[str, str] | None = None) -> Iterator[LoadedPrograms]:
    """The programs in the block; all are gone after it."""
    programs = LoadedPrograms(folder, modules or {})
    try:
        yield programs
    finally:
        programs.close()
