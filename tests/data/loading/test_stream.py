"""The training stream: one order for any world and any workers, exact restarts, bad samples replaced and told."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.loading.stream import TrainStream
from tests.data.small_shards import WordTokenizer, picture, sample, texts, with_json, write_shard, write_source
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

IMAGE = ImageSpec(size=16)
FLIP = {"flip": True}


def stream(
    pattern: str | dict[str, object],
    *,
    global_batch: int = 8,
    seed: int = 0,
    world: World | None = None,
    **fields: object,
) -> TrainStream:
    sources = pattern if isinstance(pattern, dict) else {"a": {"shards": pattern}}
    config = DataConfig.model_validate({"sources": sources, "workers": 0, **fields})
    return TrainStream(config, IMAGE, WordTokenizer(), global_batch=global_batch, seed=seed, world=world or World())


def captions(batch: Batch) -> list[str]:
    return texts(batch.texts.tokens, batch.texts.lengths)


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.step, a.keys, a.skipped) == (b.step, b.keys, b.skipped)
        for mine, other in ((a.pixels, b.pixels), (a.texts.tokens, b.texts.tokens), (a.sample_ids, b.sample_ids)):
            assert torch.equal(mine, other)


def test_a_batch_holds_what_the_shards_hold(tmp_path: Path) -> None:
    data = stream(write_source(tmp_path, [7, 9]))
    assert data.num_samples == 16
    assert [(source.name, source.num_shards, source.num_samples) for source in data.sources] == [("a", 2, 16)]
    batches = list(data.batches(0, 2))
    assert sorted(key for batch in batches for key in batch.keys) == [f"{n:06d}" for n in range(16)]
    for batch in batches:
        assert batch.pixels.shape == (8, 3, 16, 16)
        assert batch.pixels.dtype == torch.uint8
        assert captions(batch) == [f"caption number {int(key)}" for key in batch.keys]
        assert batch.texts.tokens.shape[1] == int(batch.texts.lengths.max())
        assert len(set(batch.sample_ids.tolist())) == 8
        assert batch.labels is None
        assert batch.skipped == ()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_global_batch_is_the_same_at_any_world_size(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "bad").mkdir()
    write_shard(tmp_path / "part-99.tar", [sample(99, jpg=b"broken", txt="x")])
    pattern = write_source(tmp_path, [11, 2, 16])
    whole = list(stream(pattern, augment=FLIP).batches(3, 6))
    ranks = [
        list(stream(pattern, augment=FLIP, world=World(rank, world_size)).batches(3, 6)) for rank in range(world_size)
    ]
    assert any(batch.skipped for batch in whole)
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert sum((part.keys for part in parts), ()) == batch.keys
        assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
        assert [text for part in parts for text in captions(part)] == captions(batch)
        assert sum((part.skipped for part in parts), ()) == batch.skipped


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "part-99.tar", [sample(99, jpg=b"", txt="x")])
    pattern = write_source(tmp_path, [11, 10])
    alone = list(stream(pattern, augment=FLIP).batches(0, 7))
    assert_same(list(stream(pattern, augment=FLIP, workers=workers).batches(0, 7)), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_at_any_step_goes_on_exactly(tmp_path: Path, workers: int) -> None:
    pattern = write_source(tmp_path, [9, 4])
    whole = list(stream(pattern, augment=FLIP).batches(0, 8))
    for start in (1, 5):
        assert_same(list(stream(pattern, augment=FLIP, workers=workers).batches(start, 8 - start)), whole[start:])


def test_a_restart_far_on_costs_nothing(tmp_path: Path) -> None:
    data = stream(write_source(tmp_path, [9, 4]))
    (batch,) = data.batches(10**12, 1)
    assert batch.step == 10**12


def test_crops_and_captions_change_with_epochs_and_seeds(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [with_json(n, captions=[f"{n} {c}" for c in "abcde"]) for n in range(8)])

    def by_key(seed: int, step: int) -> dict[str, tuple[str, bytes]]:
        (batch,) = stream(str(shard), seed=seed, augment={"crop_scale": (0.2, 0.9)}).batches(step, 1)
        rows = zip(captions(batch), batch.pixels.numpy(), strict=True)
        return {key: (text, pixels.tobytes()) for key, (text, pixels) in zip(batch.keys, rows, strict=True)}

    first, later, other = by_key(0, 0), by_key(0, 1), by_key(1, 0)
    assert first == by_key(0, 0)
    for another in (later, other):
        assert all(first[key][1] != another[key][1] for key in first)
        assert any(first[key][0] != another[key][0] for key in first)
    (batch,) = stream(str(shard), caption="first").batches(5, 1)
    assert captions(batch) == [f"{int(key)} a" for key in batch.keys]


def test_weighted_sources_and_labels(tmp_path: Path) -> None:
    few = write_shard(tmp_path / "few.tar", [sample(n, jpg=picture(n), txt="few", cls=n) for n in range(4)])
    many = write_shard(
        tmp_path / "many.tar", [sample(n, png=picture(n, form="PNG"), txt="many", cls=n) for n in range(9)]
    )
    sources: dict[str, object] = {"few": {"shards": str(few), "weight": 3}, "many": {"shards": str(many), "weight": 1}}
    data = stream(sources, global_batch=12)
    assert data.num_samples == 13
    for batch in data.batches(0, 4):
        assert sorted(captions(batch)) == ["few"] * 9 + ["many"] * 3
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(key) for key in batch.keys]


def corrupt(number: int) -> bytes:
    whole = picture(number, (200, 200))
    return whole[: len(whole) // 2]


def bad_samples() -> list[dict[str, bytes | str | int]]:
    return [
        sample(100, jpg=corrupt(1), txt="half an image"),
        sample(101, jpg=b"", txt="no bytes"),
        sample(102, jpg=picture(3), txt="  \n"),
        sample(103, jpg=picture(3)),
        sample(104, jpg=picture(3), txt=b"caf\xe9"),
        sample(105, jpg=picture(3), json="{"),
        sample(106, jpg=picture(3), json=json.dumps({"captions": ["", " "]})),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_told(tmp_path: Path, workers: int) -> None:
    bad = write_shard(tmp_path / "part-bad.tar", bad_samples())
    data = stream(write_source(tmp_path, [30, 12]), global_batch=7, workers=workers)
    epoch = list(data.batches(0, 7))
    skips = {skip.key: skip for batch in epoch for skip in batch.skipped}
    assert sum(len(batch.skipped) for batch in epoch) == 7
    expected = ["decoded", "empty", "no caption", "no caption", "UTF-8", "json", "no caption"]
    for key, reason in zip(range(100, 107), expected, strict=True):
        skip = skips[f"{key:06d}"]
        assert (skip.source, skip.shard) == ("a", str(bad))
        assert reason in skip.reason
    for batch in epoch:
        assert len(set(batch.keys)) == 7  # a substitute is none of the batch's own samples
        assert {skip.substitute.rpartition(":")[2] for skip in batch.skipped} <= set(batch.keys)
        assert not {skip.key for skip in batch.skipped} & set(batch.keys)
    seen = {key for batch in epoch for key in batch.keys}
    assert seen == {f"{n:06d}" for n in range(42)}  # each good one came


def test_a_batch_larger_than_the_good_samples_still_fills(tmp_path: Path) -> None:
    write_shard(tmp_path / "part-bad.tar", bad_samples())
    (batch,) = stream(write_source(tmp_path, [1]), global_batch=8).batches(0, 1)
    assert batch.keys == ("000000",) * 8
    assert len(batch.skipped) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_usable_sample_ends_in_one_line(tmp_path: Path, workers: int) -> None:
    shard = write_shard(tmp_path / "bad.tar", bad_samples())
    with pytest.raises(UserError, match=r"^data\.sources\.a: 7 samples in a row cannot be used; the last is [^\n]*$"):
        list(stream(str(shard), workers=workers).batches(0, 1))


def test_a_shard_that_vanishes_is_a_run_of_bad_samples(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [3, 3, 10])
    data = stream(pattern, global_batch=16)
    (tmp_path / "part-00.tar").unlink()
    (tmp_path / "part-01.tar").write_bytes(b"overwritten")
    (batch,) = data.batches(0, 1)
    assert sorted({int(key) for key in batch.keys}) == list(range(6, 16))
    reasons = {Path(skip.shard).name: skip.reason for skip in batch.skipped}
    assert sorted(reasons) == ["part-00.tar", "part-01.tar"]
    assert "is not there" in reasons["part-00.tar"]
    assert "is no tar" in reasons["part-01.tar"]
    assert len(batch.skipped) == 6


def test_a_cut_shard_is_used_as_far_as_it_goes_and_told_at_the_start(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [6, 6])
    cut = tmp_path / "part-01.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    data = stream(pattern, global_batch=4)
    (problem,) = data.problems
    assert problem.shard == str(cut)
    assert "cut off" in problem.reason
    assert 6 < data.num_samples < 12
    assert all(not batch.skipped for batch in data.batches(0, 6))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: str(folder / "no-*.tar"), "matches no file"),
        (lambda folder: str(write_shard(folder / "a.tar", [sample(0, jpg=picture(0))])), "no caption field"),
        (lambda folder: str((folder / "text.tar").write_text("hello") and folder / "text.tar"), "is no tar file"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_the_start(tmp_path: Path, make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=said) as error:
        stream(make(tmp_path))
    assert str(error.value).startswith("data.sources.a")
    assert "\n" not in str(error.value)


def test_fewer_rows_than_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="global batch of 2 leaves some of 3 ranks"):
        stream(write_source(tmp_path, [4]), global_batch=2, world=World(0, 3))


def test_a_program_that_stops_in_mid_stream_ends_at_once(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [20])
    program = f"""
from tests.data.loading.test_stream import stream
batches = stream({pattern!r}, workers=2).batches(0, 10**6)
print(next(batches).step, next(batches).step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0 1\n"
    assert done.stderr == ""


def test_images_are_the_stored_ones(tmp_path: Path) -> None:
    flat = [Image.new("RGB", (30, 20), (n * 20, 255 - n * 20, 7)) for n in range(8)]
    files = []
    for image in flat:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    shard = write_shard(tmp_path / "a.tar", [sample(n, png=files[n], txt="x") for n in range(8)])
    (batch,) = stream(str(shard)).batches(0, 1)
    for key, pixels in zip(batch.keys, batch.pixels, strict=True):
        expected = torch.tensor([int(key) * 20, 255 - int(key) * 20, 7], dtype=torch.uint8)
        assert (pixels == expected[:, None, None]).all()
