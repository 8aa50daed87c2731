"""A stand-in for pdsh on this machine, where all hosts are: a shell a host, as ssh gives one, with little around it.

Run as `python -IS pdsh_program.py FOLDER ARGUMENT...`. A `pkill` goes to what earlier calls have started, and to
nothing else.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path


def main() -> int:
    started = Path(sys.argv[1]) / "started"
    words = sys.argv[2:]
    hosts: list[str] = []
    while words[0].startswith("-"):
        option = words.pop(0)
        value = words.pop(0) if option in ("-f", "-w") else ""
        hosts = value.split(",") if option == "-w" else hosts
    command = " ".join(words)
    if command.startswith("pkill "):
        end(started.read_text().split(), words[-1].replace("\\", "").encode())
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one alone makes it list what runs
    shells = [
        subprocess.Popen(
            [str(shutil.which("bash")), "-c", command.replace("%n", str(number)).replace("%h", host)],
            env={"HOME": os.environ.get("HOME", "/"), "PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )
        for number, host in enumerate(hosts)
    ]
    with started.open("a") as file:
        file.write("".join(f"{shell.pid}\n" for shell in shells))
    return max(abs(shell.wait()) for shell in shells)


def end(sessions: list[str], pattern: bytes) -> None:
    """End the processes of these sessions whose command has `pattern`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            session = (path / "stat").read_text().rpartition(")")[2].split()[3]
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            if session in sessions and pattern in words:
                os.kill(int(path.name), signal.SIGTERM)
        except OSError:
            continue


def write_pdsh(folder: Path, state: Path) -> None:
    """Put the program into `folder`, which goes on a PATH; what it has started is noted in `state`."""
    words = [sys.executable, "-IS", __file__, str(state)]
    (folder / "pdsh").write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    (folder / "pdsh").chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
