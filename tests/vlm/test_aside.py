"""A folder appears whole or not at all, and nobody's folder is removed but one that we made."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.aside import folder_aside, remove_files


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "made"
    with folder_aside(target) as aside:
        (aside / "a").write_text("a")
        assert not target.exists()
    assert [entry.name for entry in target.iterdir()] == ["a"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_mask()
    with pytest.raises(IsADirectoryError), folder_aside(tmp_path / "other") as aside:
        aside.write_text("a folder cannot hold")
    with pytest.raises(OSError, match="not empty"), folder_aside(target) as aside:
        (aside / "b").write_text("b")
    assert (target / "a").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["deep"]
    assert [entry.name for entry in target.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as ended, folder_aside(tmp_path / "made"):
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a[1]"
    code = f"""
import os, pathlib
from vlm.aside import folder_aside
with folder_aside(pathlib.Path({str(target)!r})) as aside:
    (aside / "half").mkdir()
    os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    users = tmp_path / f".{target.name}.mine.partial"
    users.mkdir()
    (users / "work").write_text("kept")
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / f".{target.name}.link.partial").symlink_to(precious)
    with folder_aside(target) as living:
        assert not left.exists()
        with folder_aside(target):
            assert living.exists()
    assert (users / "work").exists()
    assert precious.exists()


def test_only_files_of_known_names_are_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "000.jpg").write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("000.jpg", "note.txt"):
        (folder / name).write_text(name)
    (folder / "001.jpg").symlink_to(outside / "000.jpg")
    (folder / "002.jpg").mkdir()
    assert not remove_files(folder, r"\d+\.jpg")
    assert sorted(entry.name for entry in folder.iterdir()) == ["002.jpg", "note.txt"]
    assert (outside / "000.jpg").exists()
    (tmp_path / "link").symlink_to(outside)
    assert not remove_files(tmp_path / "link", r".*")
    assert (outside / "000.jpg").exists()
    assert remove_files(outside, r".*")
    assert not outside.exists()
    assert remove_files(outside, r".*")


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
