"""Held-out sets: every sample once over the ranks, equal batches, broken samples marked."""

import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data.images.views import evaluation_view
from data.loading.held_out_images import HeldOutBatch
from data.loading.heldout import HeldOutSet
from data.shards.cache import CacheConfig, ShardCache
from tests.data.small_shards import picture, sample, with_json, write_shard, write_source
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

IMAGE = ImageSpec(size=16)
REAL = Path(os.environ.get("VLM_TEST_DATA", "missing"))


def all_batches(held_out: HeldOutSet, world_size: int, batch_size: int, workers: int = 0) -> list[list[HeldOutBatch]]:
    return [list(held_out.batches(World(rank, world_size), batch_size, workers)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_sample_comes_once_and_ranks_stay_in_step(tmp_path: Path, world_size: int, batch_size: int) -> None:
    held_out = HeldOutSet(write_source(tmp_path, [6, 7]), IMAGE)
    ranks = all_batches(held_out, world_size, batch_size)
    shapes = [[tuple(batch.images.shape) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert len({shape for rank in shapes for shape in rank}) == 1
    rows = [
        (int(index), pixels)
        for batches in ranks
        for batch in batches
        for index, valid, pixels in zip(batch.indices, batch.valid, batch.images, strict=True)
        if valid
    ]
    assert [index for index, _ in rows] == list(range(13))
    for index, pixels in rows:
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), evaluation_view(picture(index), IMAGE))
    assert held_out.skipped == ()


def test_workers_change_nothing(tmp_path: Path) -> None:
    held_out = HeldOutSet(write_source(tmp_path, [6, 7]), IMAGE)
    for ours, theirs in zip(all_batches(held_out, 2, 3)[1], all_batches(held_out, 2, 3, workers=2)[1], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.valid, theirs.valid)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 2), (2, 2), (3, 0)])  # of 16 samples: 16, 8, 6 batches
def test_by_default_workers_load_where_there_are_batches_for_them(
    tmp_path: Path, batch_size: int, processes: int
) -> None:
    held_out = HeldOutSet(write_source(tmp_path, [9, 7]), IMAGE)
    before = len(psutil.Process().children())
    batches = held_out.batches(World(), batch_size)
    next(batches)
    assert len(psutil.Process().children()) - before == processes
    for one, other in zip(batches, all_batches(held_out, 1, batch_size)[0][1:], strict=True):
        assert torch.equal(one.images, other.images)


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    held_out = HeldOutSet(write_source(tmp_path, [6, 7]), IMAGE, limit=8)
    assert len(held_out) == 8
    assert held_out.keys() == tuple(f"{n:06d}" for n in range(8))
    assert len(held_out.captions) == 8
    assert len(HeldOutSet(str(tmp_path / "*.tar"), IMAGE, limit=100)) == 13


def test_captions_fields_and_images_are_read_without_decoding(tmp_path: Path) -> None:
    samples = [
        with_json(0, captions=["one", " two ", ""], objects=[{"shape": "circle"}]),
        sample(1, jpg=b"not decodable", txt="still read"),
        sample(2, jpg=picture(2), json="{broken"),
        sample(3, jpg=picture(3)),
    ]
    held_out = HeldOutSet(str(write_shard(tmp_path / "a.tar", samples)), IMAGE)
    assert held_out.captions == (("one", "two"), ("still read",), (), ())
    assert held_out.fields(0)["objects"] == [{"shape": "circle"}]
    assert held_out.fields(2) == {}
    assert held_out.stored_image(1) == b"not decodable"
    assert held_out.labels is None
    assert [(skip.key, "json" in skip.reason) for skip in held_out.skipped] == [("000002", True)]


def test_broken_images_and_labels_are_not_valid_and_counted_once(tmp_path: Path) -> None:
    samples = [sample(n, jpg=picture(n), cls=n) for n in range(6)]
    samples[1] = sample(1, jpg=b"", cls=1)
    samples[3] = sample(3, jpg=picture(3), cls="cat")
    samples[4] = sample(4, jpg=picture(4))
    held_out = HeldOutSet(str(write_shard(tmp_path / "a.tar", samples)), IMAGE)
    for _ in range(2):
        (batch,) = held_out.batches(World(), 8)
        assert batch.images.shape[0] == 6
        assert batch.valid.tolist() == [True, False, True, False, False, True]
        assert batch.labels is not None
        assert batch.labels[batch.valid].tolist() == [0, 2, 5]
    assert {skip.key: skip.reason.split("(")[0] for skip in held_out.skipped} == {
        "000001": "its image is empty ",
        "000003": "its cls is no class number but b'cat'",
        "000004": "it has no cls, unlike others of the set",
    }


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluations\.val\.shards: no-\*\.tar matches no file"):
        HeldOutSet("no-*.tar", IMAGE, root=str(tmp_path), where="evaluations.val.shards")


def test_gzipped_shards_work(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(n, jpg=picture(n), cls=9 - n) for n in range(5)])
    held_out = HeldOutSet(str(shard), IMAGE, cache=ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))
    (batch,) = held_out.batches(World(), 5)
    assert batch.labels is not None
    assert batch.labels.tolist() == [9, 8, 7, 6, 5]
    assert np.array_equal(batch.images[2].permute(1, 2, 0).numpy(), evaluation_view(picture(2), IMAGE))


@pytest.mark.skipif(not REAL.is_dir(), reason="set VLM_TEST_DATA to a folder with the Flickr8k and CIFAR-10 shards")
def test_real_photographs(tmp_path: Path) -> None:
    held_out = HeldOutSet("flickr8k-test-*.tar", ImageSpec(size=112), root=str(REAL))
    assert len(held_out) == 1000
    assert {len(captions) for captions in held_out.captions} == {5}
    cache = ShardCache(CacheConfig(folder=str(tmp_path)))
    digits = HeldOutSet("cifar10-test-*.tar.gz", ImageSpec(size=32), root=str(REAL), cache=cache)
    assert digits.labels is not None
    assert torch.bincount(digits.labels).tolist() == [1000] * 10
    batches = list(digits.batches(World(), 1000))
    assert all(bool(batch.valid.all()) for batch in batches)
    assert json.loads((REAL / "cifar10-classnames.json").read_text())[3] == "cat"


LINED = ["a dog runs\nthe brown dog\n", "one cat\r\n\r\ntwo cats"]
LINES = (("a dog runs", "the brown dog"), ("one cat", "two cats"))
WHOLE = (("a dog runs\nthe brown dog",), ("one cat\r\n\r\ntwo cats",))


def lined(folder: Path, texts: list[str], **more: str) -> HeldOutSet:
    samples = [sample(n, jpg=picture(n), txt=text, **more) for n, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)
    return HeldOutSet(str(write_shard(folder / "0.tar", samples)), IMAGE)


def test_txt_members_of_several_lines_hold_one_caption_a_line(tmp_path: Path) -> None:
    held_out = lined(tmp_path, LINED)
    assert (held_out.captions, held_out.txt_layout) == (LINES, "lines")
    shard = str(tmp_path / "0.tar")
    assert HeldOutSet(shard, IMAGE, txt="whole").captions == WHOLE
    assert HeldOutSet(shard, IMAGE, txt="lines").captions == LINES


@pytest.mark.parametrize(
    ("texts", "layout"), [(["a", "b\nc"], "whole"), (["a\nb", "c\nd", "e"], "mixed"), (["a", "b"], "whole")]
)
def test_other_txt_members_are_one_caption_each(tmp_path: Path, texts: list[str], layout: str) -> None:
    held_out = lined(tmp_path, texts)
    assert (held_out.captions, held_out.txt_layout) == (tuple((text,) for text in texts), layout)


def test_captions_in_json_are_no_lines(tmp_path: Path) -> None:
    held_out = lined(tmp_path, LINED, json=json.dumps({"captions": ["x\ny"]}))
    assert (held_out.captions, held_out.txt_layout) == ((("x\ny",), ("x\ny",)), "whole")


def test_a_public_retrieval_set_says_so(tmp_path: Path) -> None:
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    assert lined(tmp_path / "test", ["a", "b\nc"]).captions == (("a",), ("b", "c"))
    (tmp_path / "dataset_type.txt").write_text("zeroshot_classification")
    assert lined(tmp_path / "test", ["a", "b\nc"]).captions == (("a",), ("b\nc",))
