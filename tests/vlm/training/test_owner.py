"""A run directory belongs to one living process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UserError
from vlm.sealed import sealed_json
from vlm.training.owner import Owner, OwnerRecord


def owned_by(folder: Path, **changes: Any) -> Path:
    """The folder as another process, which differs so from this one, owns it."""
    record = {**json.loads(OwnerRecord.of_this_process(folder).model_dump_json()), **changes}
    (folder / "owner.json").write_text(sealed_json(record))
    return folder


def test_it_is_released_and_taken_again(tmp_path: Path) -> None:
    first, second = Owner(tmp_path), Owner(tmp_path)
    assert first.take() is None
    with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .* since 20"):
        second.take()
    second.release()  # not its own
    assert (tmp_path / "owner.json").exists()
    first.release()
    assert list(tmp_path.iterdir()) == []
    assert second.take() is None


def test_a_living_process_keeps_it_and_a_killed_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19])
        owned_by(tmp_path, pid=other.pid, began=began)
        with pytest.raises(UserError, match=rf"process {other.pid} on .*; end that run, or choose another run=DIR"):
            Owner(tmp_path).take()
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its number
        taken = Owner(tmp_path).take()
    assert taken is not None
    assert taken.startswith(f"taken over from process {other.pid} on ")


@pytest.mark.parametrize("changes", [{"began": 1}, {"boot": "an earlier one"}, {"pid": 2**22 + 1}])
def test_a_number_that_is_another_process_by_now_is_no_owner(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "which has ended" in str(Owner(owned_by(tmp_path, **changes)).take())


def test_a_copy_of_an_owned_folder_is_nobodys_and_a_moved_one_is_not(tmp_path: Path) -> None:
    original = tmp_path / "run"
    original.mkdir()
    Owner(original).take()
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    assert Owner(copy).take() is None
    with pytest.raises(UserError, match="is being written by process"):
        Owner(original.rename(tmp_path / "moved")).take()


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_what_cannot_be_seen_from_here_is_left_to_the_user(tmp_path: Path, changes: dict[str, Any]) -> None:
    owner = Owner(owned_by(tmp_path, **changes))
    with pytest.raises(UserError, match=r"cannot be looked at from here; if it has ended, remove .*owner\.json and"):
        owner.take()
    (tmp_path / "owner.json").unlink()
    assert owner.take() is None


def test_a_damaged_record_is_named_and_an_empty_one_is_nobodys(tmp_path: Path) -> None:
    path = owned_by(tmp_path) / "owner.json"
    for content in (path.read_bytes().replace(b'"pid"', b'"qid"'), b"{", b'{"host": 3}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"owner\.json is damaged"):
            Owner(tmp_path).take()
    path.write_bytes(b"")
    assert Owner(tmp_path).take() is None
