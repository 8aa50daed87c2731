"""Checkpoints are complete or absent, and damage is noticed."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from vlm.atomic import sha256
from vlm.checkpoint.folder import clear_unfinished, complete_checkpoints, delete, put_away
from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.checkpoint.manifest import Manifest, NewerCheckpointError
from vlm.checkpoint.retention import Retention
from vlm.checkpoint.writer import Group, Writer, write_checkpoint
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError
from vlm.sealed import sealed_json


def manifest(step: int) -> Manifest:
    return Manifest(
        step=step,
        samples=step * 8,
        num_updates=step,
        world_size=1,
        engine="ddp",
        threads=1,
        model={},
        data={"a": 3},
        versions={},
    )


def groups(tensors: dict[str, Tensor]) -> dict[str, Group]:
    return {"weights": ({name: tensor.numel() for name, tensor in tensors.items()}, tensors.__getitem__)}


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor([3.5]), "count": torch.tensor(7)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(12), groups(TENSORS), World())
    assert path.name == "step-00000012"
    checkpoint = Checkpoint(path)
    checkpoint.verify(World())
    assert checkpoint.manifest.step == 12
    assert checkpoint.shapes("weights") == {"a.weight": (2, 3), "scale": (1,), "count": ()}
    for name, tensor in checkpoint.tensors("weights").items():
        assert torch.equal(tensor, TENSORS[name])
    assert checkpoint.names("ema") == []


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turn one bit of a file round, as a disk does."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    (file,) = path.glob("*.safetensors")
    if damage == "flip":
        flip(file, -1)
    else:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(EveryRankError, match=r"weights-00000\.safetensors is damaged"):
        Checkpoint(path).verify(World())
    for read in (Checkpoint(path).inference_weights, lambda: Checkpoint(path).shapes("weights")):
        with pytest.raises(UserError, match=r"weights-00000\.safetensors is damaged"):
            read()


def test_every_file_is_checked_by_verify_and_by_whoever_reads_it(tmp_path: Path) -> None:
    both = groups(TENSORS) | {"ema": groups(TENSORS)["weights"], "exp_avg": groups(TENSORS)["weights"]}
    own = {"own": {"table": torch.arange(3.0)}}
    names = [f"{group}-00000.safetensors" for group in ("ema", "exp_avg", "own", "weights")]
    for name in names:
        path = write_checkpoint(tmp_path, manifest(1), both, World(), own)
        assert list(Checkpoint(path).manifest.files) == names
        flip(path / name, -1)
        with pytest.raises(EveryRankError, match=rf"{name} is damaged"):
            Checkpoint(path).verify(World())
        group = name.partition("-")[0]
        read = Checkpoint(path).by_rank if group == "own" else Checkpoint(path).tensors
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            read(group)


def problem_of(folder: Path) -> str:
    """The problem of a checkpoint, as far as its manifest tells; nothing when it is right."""
    try:
        Checkpoint(folder)
    except UserError as error:
        return str(error)
    return ""


def test_no_bit_of_a_manifest_flips_unseen(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(12), groups(TENSORS), World()) / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) * 8, 9):  # each bit of a byte in turn, of every byte but one in nine
        flip(path, place // 8, place % 8)
        said = problem_of(path.parent)
        if place // 8 == len(whole) - 1 and said == "":  # white space in place of the last line break says the same
            assert json.loads(path.read_text())["step"] == 12
        else:
            assert str(path) in said
        path.write_bytes(whole)


def test_a_manifest_of_a_newer_version_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(12), groups(TENSORS), World()) / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    for newer in ({"format": "vlm-checkpoint-4"}, {"an_invention": 1}):
        path.write_text(sealed_json(values | newer))
        with pytest.raises(NewerCheckpointError, match="a newer version of vlm wrote it"):
            Checkpoint(path.parent)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: the checksum in its last line is missing"):
        Checkpoint(path.parent)
    path.write_text(sealed_json(values | {"step": -1}))
    with pytest.raises(UserError, match="not a readable manifest: step"):
        Checkpoint(path.parent)
    path.write_text(sealed_json(values | {"files": {"../../secret.safetensors": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(UserError, match="not a readable manifest: files"):
        Checkpoint(path.parent)
    path.write_text(sealed_json(values))
    other = path.parent.rename(tmp_path / "step-00000013")
    with pytest.raises(UserError, match="is of step 12: the folder was renamed"):
        Checkpoint(other)


def test_a_checkpoint_of_the_format_before_is_read(tmp_path: Path) -> None:
    """Format 2 had no parts: what is whole in one file is as it was."""
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    values = json.loads((path / "manifest.json").read_text())
    del values["checksum"]
    (path / "manifest.json").write_text(sealed_json(values | {"format": "vlm-checkpoint-2"}))
    Checkpoint(path).verify(World())
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in Checkpoint(path).tensors("weights").items())


def write_and_damage(folder: Path) -> list[str]:
    """On two ranks: what each has written, and what all of them say of damage to each file in turn."""
    world = World.current()
    tensors = {str(n): torch.full((10,), float(n)) for n in range(4)}
    path = write_checkpoint(folder, manifest(1), groups(tensors), world, {"own": {"rank": torch.tensor(world.rank)}})
    told = []
    for name in Checkpoint(path).manifest.files:
        if world.is_main:
            flip(path / name, -1)
        world.barrier()
        try:
            Checkpoint(path).verify(world)
            told.append("")
        except EveryRankError as error:
            told.append(str(error).partition(f"{path}: ")[2].partition(" ")[0])
        world.barrier()
        if world.is_main:
            flip(path / name, -1)
        world.barrier()
    Checkpoint(path).verify(world)
    held = [sorted(Checkpoint(path).tensors("weights")), sorted(os.listdir(path))]
    return [*told, str(held), write_what_is_no_number(folder, tensors)]


def write_what_is_no_number(folder: Path, tensors: dict[str, Tensor]) -> str:
    """On two ranks: what each says of a tensor that the last rank writes, when that has been found."""
    world = World.current()
    writer = Writer(folder, world)
    writer.begin(manifest(2), groups({**tensors, "3": torch.tensor([math.inf] * 10)}))
    while not writer.is_written():
        time.sleep(0.001)
    try:
        writer.complete()
    except EveryRankError as error:
        return f"{writer.step} {str(error).partition('step-')[2]}"
    return ""


@pytest.mark.slow
def test_ranks_share_the_writing_and_all_of_them_hear_of_damage(tmp_path: Path) -> None:
    names = [f"{group}-{rank:05d}.safetensors" for group in ("own", "weights") for rank in (0, 1)]
    held = str([["0", "1", "2", "3"], ["manifest.json", *names]])
    lost = "weights-00001.safetensors: weights of 3 holds what is no finite number"
    told = f"None 00000002 cannot be written ({lost}); those before it are whole: --resume auto goes on"
    assert run_ranks(write_and_damage, 2, tmp_path) == [[*names, held, told]] * 2
    assert os.listdir(tmp_path) == ["step-00000001"]
    halves = [(tmp_path / f"step-00000001/weights-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert halves[0] == halves[1]  # two tensors each


def test_a_missing_file_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="is missing"):
        Checkpoint(path)
    with pytest.raises(UserError, match="is no checkpoint"):
        Checkpoint(tmp_path)
    for content in ("{not json", "[1]", "[" * 100_000, "\xff"):
        (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=r"manifest\.json(:| is damaged)"):
            Checkpoint(tmp_path)


def test_a_folder_without_its_manifest_is_no_complete_checkpoint(tmp_path: Path) -> None:
    paths = {step: write_checkpoint(tmp_path, manifest(step), groups(TENSORS), World()) for step in (1, 2)}
    (paths[2] / "manifest.json").unlink()
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "manifest.json").write_text("")
    assert complete_checkpoints(tmp_path) == {1: paths[1]}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, manifest(step), groups(TENSORS), World())
    delete(put_away(tmp_path, Retention(2, 1), step=10))
    assert list(complete_checkpoints(tmp_path)) == [3, 10]
    delete(put_away(tmp_path, None, step=10))
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoints_beyond_the_step_of_a_run_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    for step in (1, 2, 3, 25, 30):
        write_checkpoint(tmp_path, manifest(step), groups(TENSORS), World())
    delete(put_away(tmp_path, Retention(2, 1), step=3))
    assert list(complete_checkpoints(tmp_path)) == [2, 3, 25, 30]
    delete(put_away(tmp_path, Retention(1, 1), step=3, good_steps=[2]))
    assert list(complete_checkpoints(tmp_path)) == [2, 3, 25, 30]


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        told = r"step-00000002 cannot be written \(weights-00000\.safe.*; it takes about 0\.0004 GB, .* GB are free"
        with pytest.raises(EveryRankError, match=told):
            write_checkpoint(tmp_path, manifest(2), groups({"large": torch.zeros(100_000)}), World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == [before.name]
    Checkpoint(before).verify(World())


_WRITER = """
import sys, torch
from pathlib import Path
from tests.vlm.checkpoint.test_format import groups, manifest
from vlm.checkpoint.writer import Writer
from vlm.distributed.world import World
tensors = {str(n): torch.full((200_000,), float(n)) for n in range(20)}
writer = Writer(Path(sys.argv[1]), World(), background=sys.argv[2] == "background")
step = 0
while True:
    step += 1
    writer.begin(manifest(step), groups(tensors))
    while not writer.is_written():
        torch.ones(100).sum()
    writer.complete()
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "where"), [(0.003, "background"), (0.03, "foreground"), (0.06, "background")])
def test_killed_while_writing_nothing_is_lost(tmp_path: Path, delay: float, where: str) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path), where], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert writer.stdout is not None
    for _ in range(2):
        done = int(writer.stdout.readline())
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.communicate()[0].split()
    done = int(rest[-1]) if rest else done
    complete = complete_checkpoints(tmp_path)
    assert len(complete) >= done
    for path in complete.values():
        Checkpoint(path).verify(World())
    clear_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == list(complete.values())


def test_what_a_kill_leaves_of_a_file_of_tensors_is_cleared(tmp_path: Path) -> None:
    partial = tmp_path / "step-00000003.partial"
    partial.mkdir()
    for name in (".tmpWhmNMh", "weights-00000.safetensors", ".manifest.json.x_1.partial"):
        (partial / name).write_bytes(b"half")
    clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Boom:
    """An object that runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unpickled",)


def test_a_pickle_in_the_place_of_a_file_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World(), {"own": {"a": torch.ones(1)}})
    values = json.loads((path / "manifest.json").read_text())
    del values["checksum"]
    for name in values["files"]:
        torch.save({"a.weight": Boom()}, path / name)
        values["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    (path / "manifest.json").write_text(sealed_json(values))
    checkpoint = Checkpoint(path)
    checkpoint.verify(World())  # it is as whoever planted it wrote it
    reads: list[Callable[[], object]] = [lambda: checkpoint.tensors("weights"), lambda: checkpoint.by_rank("own")]
    for read in reads:
        with pytest.raises(
            UserError, match=r"step-00000001: (weights|own)-00000\.safetensors is no safetensors file: "
        ):
            read()
    assert not (tmp_path / "unpickled").exists()


def test_the_first_differing_tensors_are_named() -> None:
    words = first_differences({"a": (1,), "b": (2, 3)}, {"b": (2, 4), "c": (1,)})
    assert words == "a is missing; b is [2, 4] but the model has [2, 3]; c is not in the model"
    assert first_differences({"a": (1,)}, {"a": (1,)}) is None


@pytest.mark.parametrize("name", ["../outside", "/abs", "link-00000.safetensors", "fifo-00000.safetensors", "a\x00"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "run", manifest(5), groups({"a": torch.ones(3)}), World())
    weights = path / "weights-00000.safetensors"
    (tmp_path / "run" / "outside").write_bytes(weights.read_bytes())
    (path / "link-00000.safetensors").symlink_to(tmp_path / "run" / "outside")
    os.mkfifo(path / "fifo-00000.safetensors")
    values = json.loads((path / "manifest.json").read_text())
    (record,) = values["files"].values()
    values = {key: value for key, value in values.items() if key in Manifest.model_fields} | {"files": {name: record}}
    (path / "manifest.json").write_text(sealed_json(values))
    with pytest.raises(UserError, match=r"^(checkpoint )?.*step-00000005"):
        Checkpoint(path)


def test_nothing_is_removed_with_a_checkpoint_that_is_not_of_it(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, manifest(step), groups({"a": torch.ones(3)}), World())
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002" / "exported").mkdir()
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "step-00000003").rename(elsewhere)
    (tmp_path / "step-00000003").symlink_to(elsewhere)
    (tmp_path / "step-mine.partial").mkdir()
    delete(put_away(tmp_path, Retention(1, 1), 4))
    clear_unfinished(tmp_path)
    assert list(complete_checkpoints(tmp_path)) == [4]
    assert (tmp_path / "step-00000001.old.partial" / "notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "step-00000002.old.partial").iterdir()] == ["exported"]
    assert (elsewhere / "manifest.json").exists()
    assert (tmp_path / "step-mine.partial").is_dir()
    for step in (1, 2, 5):  # the names of the rest are in the way of nothing
        write_checkpoint(tmp_path, manifest(step), groups({"a": torch.ones(3)}), World())
    delete(put_away(tmp_path, Retention(1, 1), 5))
    assert list(complete_checkpoints(tmp_path)) == [5]
    assert (tmp_path / "step-00000001.old.partial" / "notes.txt").read_text() == "mine"
