"""Measurements of a machine: made once, the same for all processes, and never a reason to fail."""

from pathlib import Path

import pytest

from vlm.config import Config
from vlm.measurements import cache_folder, measured_once


class Speed(Config):
    rate: float


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(rate: float, of: str = "adding") -> float:
    return measured_once("speed", {"of": of}, Speed, lambda: Speed(rate=rate)).rate


def test_a_measurement_is_made_once_for_each_thing_that_is_measured(folder: Path) -> None:
    assert [measured(1.0), measured(2.0), measured(3.0, "copying"), measured(4.0)] == [1.0, 1.0, 3.0, 1.0]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.usefixtures("folder")
def test_of_two_processes_that_measure_at_a_time_the_first_to_end_decides() -> None:
    def slow() -> Speed:
        assert measured(1.0) == 1.0  # another process, meanwhile
        return Speed(rate=2.0)

    assert measured_once("speed", {"of": "adding"}, Speed, slow).rate == 1.0


@pytest.mark.parametrize("content", ["", "[]", "{", '{"of": "another", "measured": {"rate": 5}}', "\0" * 99])
def test_a_damaged_file_is_measured_again_and_mended(folder: Path, content: str) -> None:
    measured(1.0)
    (path,) = folder.iterdir()
    path.write_text(content)
    assert [measured(2.0), measured(3.0)] == [2.0, 2.0]


def test_a_measurement_of_another_form_is_made_again(folder: Path) -> None:
    measured(1.0)
    (path,) = folder.iterdir()
    path.write_text(path.read_text().replace("rate", "pace"))
    assert [measured(2.0), measured(3.0)] == [2.0, 2.0]


def test_where_nothing_can_be_kept_each_process_measures(folder: Path) -> None:
    folder.write_text("a file where the folder would be")
    assert [measured(1.0), measured(2.0)] == [1.0, 2.0]


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/vlm")
