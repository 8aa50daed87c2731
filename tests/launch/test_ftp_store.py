"""A real store, an FTP server in a process of its own: checkpoints go there and back, in spite of what it does."""

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.checkpoint_copy import copy_checkpoint, newest_stored
from launch.checkpoint_tools import verified
from launch.mirror import Mirror, fetch_run, leave_later, require_mirror
from tests.launch.lives import wait_until
from tests.launch.test_checkpoint_commands import QUICK, a_run, contents
from tests.ranks import free_port
from tests.vlm.checkpoint.test_format import flip
from vlm.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pyftpdlib") is None, reason="pyftpdlib is not installed")


class FtpServer:
    """Serves a folder to whoever writes the right password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"ftp://me:secret@127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        who = ["--username", "me", "--password", "secret", "--write"]
        where = ["--interface", "127.0.0.1", "--port", str(self.port), "--directory", str(self.folder)]
        command = [sys.executable, "-m", "pyftpdlib", *who, *where]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(self._is_there)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_there(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FtpServer]:
    (tmp_path / "store").mkdir()
    serving = FtpServer(tmp_path / "store")
    yield serving
    serving.stop()


def test_checkpoints_go_there_and_back(tmp_path: Path, server: FtpServer) -> None:
    saved, kept = a_run(tmp_path / "run"), f"{server.url}/far/kept"
    server.stop()
    with pytest.raises(UserError, match=r"copy: ftp://.*/kept/step-00000009/.*: Connection refused \(4 attempts\)"):
        copy_checkpoint(str(tmp_path / "run"), kept, QUICK)
    server.start()
    assert copy_checkpoint(str(saved[3]), kept, QUICK) == f"{kept}/step-00000003"
    assert copy_checkpoint(str(tmp_path / "run"), kept, QUICK) == f"{kept}/step-00000009"
    assert contents(server.folder / "far/kept/step-00000009") == contents(saved[9])
    back = copy_checkpoint(kept, str(tmp_path / "back"), QUICK)
    assert contents(Path(back)) == contents(saved[9])


def test_a_run_is_fetched_from_the_newest_that_is_whole(tmp_path: Path, server: FtpServer) -> None:
    run, url, told = tmp_path / "run", f"{server.url}/run", list[str]()
    a_run(run)
    require_mirror(url, QUICK, resuming=False)
    mirror = Mirror(run, url, QUICK, told.append)
    for step in (3, 6, 9):
        mirror.copy(step)
        wait_until((server.folder / f"run/checkpoints/step-0000000{step}/manifest.json").exists)
    mirror.close()
    assert told == []
    with pytest.raises(UserError, match="already holds a run; go on with it by --resume auto"):
        require_mirror(url, QUICK, resuming=False)
    # A store without a checkpoint's file, and one that wrote half of it.
    stored = server.folder / "run/checkpoints"
    (stored / "step-00000009/weights-00000.safetensors").unlink()
    flip(stored / "step-00000006/weights-00000.safetensors", -1)
    again = tmp_path / "again"
    places = {step: (f"{url}/checkpoints/step-0000000{step}", "weights-00000.safetensors") for step in (3, 6, 9)}
    size = (run / "checkpoints/step-00000003/weights-00000.safetensors").stat().st_size
    assert list(verified([url])) == [
        (True, f"ok    {places[3][0]}: 1 files, {size / 1e9:.3g} GB"),
        (False, f"fail  {'/'.join(places[6])} is damaged (its bytes do not match the manifest's SHA-256)"),
        (False, f"fail  {'/'.join(places[9])} is missing"),
    ]
    first, second, last = fetch_run(url, again, QUICK)
    assert first == f"{places[9][0]} is passed over: {'/'.join(places[9])} is missing"
    assert second.startswith(f"{places[6][0]} is passed over: {'/'.join(places[6])} is damaged")
    assert last == f"{again} is empty: its last checkpoint was fetched from {url}/checkpoints/step-00000003"
    assert contents(again / "checkpoints/step-00000003") == contents(run / "checkpoints/step-00000003")
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    leave_later(url, 3, QUICK)  # as a run does that goes on from there
    assert newest_stored(url, QUICK) == f"{url}/checkpoints/step-00000003"
