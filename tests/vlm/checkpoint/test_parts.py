"""Each rank writes its part of a tensor, a reader puts them together, and all ranks hear of one that cannot write."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.checkpoint.test_format import groups, manifest
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.parts import Part
from vlm.checkpoint.writer import Group, Writer, write_checkpoint
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError


def cut(tensors: dict[str, Tensor], ends: dict[str, list[int]]) -> dict[str, Group]:
    """The tensors as a rank has them: the elements up to its end, from that of the rank before."""
    rank = World.current().rank

    def part(name: str) -> Part:
        start, end = [0, *ends[name]][rank : rank + 2]
        return Part(tensors[name].flatten()[start:end], start, tuple(tensors[name].shape))

    return {"weights": ({name: tensor.numel() for name, tensor in tensors.items()}, part)}


@contextmanager
def no_large_files() -> Iterator[None]:
    """This process cannot write more than 10 kB to a file in the block, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def parts_and_failures(folder: Path) -> list[str]:
    """On two ranks: parts of uneven tensors, a write that rank 1 cannot do, a folder that rank 0 cannot make."""
    world, told = World.current(), list[str]()
    tensors = {"a": torch.arange(10.0).view(2, 5), "b": torch.arange(4.0), "c": torch.arange(60_000.0)}
    parts = cut(tensors, {"a": [4, 10], "b": [4, 4], "c": [10, 60_000]})
    writer = Writer(folder, world)
    writer.begin(manifest(1), parts)
    writer.complete()
    with no_large_files() if world.rank == 1 else nullcontext():
        writer.begin(manifest(2), parts)
        asked = 1
        while not writer.is_written():
            asked += 1
        try:
            writer.complete()
        except EveryRankError as error:
            told += [str(error), str(world.gather_objects(asked))]
    try:
        Writer(folder / "step-00000001" / "manifest.json", world).begin(manifest(3), parts)
    except EveryRankError as error:
        told.append(str(error))
    return told


def test_ranks_write_their_parts_and_all_of_them_hear_of_one_that_cannot(tmp_path: Path) -> None:
    told = run_ranks(parts_and_failures, 2, tmp_path)
    assert told[0] == told[1]
    failed, asked, no_folder = told[0]
    assert "step-00000002 cannot be written (weights-00001.safetensors: " in failed
    assert "File too large; it takes about 0.00024 GB, " in failed
    first, second = asked.strip("[]").split(", ")
    assert first == second  # after the same step
    assert "manifest.json/step-00000003 cannot be written (" in no_folder
    assert "Not a directory" in no_folder
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    path = tmp_path / "step-00000001"
    checkpoint = Checkpoint(path)
    checkpoint.verify(World())
    sizes = [sum(map(Tensor.numel, load_file(path / f"weights-0000{rank}.safetensors").values())) for rank in (0, 1)]
    assert sizes == [4 + 4 + 10, 6 + 59_990]  # nobody wrote the whole of a tensor that is cut
    assert checkpoint.shapes("weights") == {"a": (2, 5), "b": (4,), "c": (60_000,)}
    for name, shape in checkpoint.shapes("weights").items():
        expected = torch.arange(float(torch.Size(shape).numel())).view(shape)
        assert torch.equal(checkpoint.tensor("weights", name), expected)


@pytest.mark.parametrize(("start", "size", "said"), [(1, 4, "do not fit together"), (0, 5, "3 of its 5 elements")])
def test_parts_that_are_not_the_whole_are_refused(tmp_path: Path, start: int, size: int, said: str) -> None:
    part = Part(torch.ones(3), start, (size,))
    path = write_checkpoint(tmp_path, manifest(1), {"weights": ({"w": 3}, lambda _: part)}, World())
    with pytest.raises(UserError, match=rf"step-00000001: weights of w is .*{said}"):
        Checkpoint(path).tensors("weights")


def test_metadata_that_tells_no_places_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("[1]", "{", '{"w": [-1, [3]]}', '{"w": 3}'):
        monkeypatch.setattr("vlm.checkpoint.writer.cut_metadata", lambda _, text=text: {"cut": text})
        path = write_checkpoint(tmp_path, manifest(1), groups({"w": torch.ones(3)}), World())
        with pytest.raises(UserError, match=r"step-00000001: weights-00000\.safetensors has no right metadata: "):
            Checkpoint(path).tensors("weights")
