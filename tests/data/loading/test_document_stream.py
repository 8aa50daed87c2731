"""Documents beside pairs: an order of their own, one batch at any world size, bad ones replaced and told."""

from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from data.loading.stream import TrainStream
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import Indexer
from data.shards.manifest import NAME, FolderManifest, ShardEntry, manifest_bytes
from data.shards.sidecar import Header, ShardIndex, save_index
from data.shards.statistics import ShardStatistics
from data.shards.tar import Problem
from tests.data.documents import colour, document, num_images, plain_picture, text_of, write_documents
from tests.data.small_shards import sample, write_shard, write_source
from vlm.batch import DEGRADED, DOCUMENT_IMAGES, DOCUMENTS, Batch, BatchPart, Documents, Images
from vlm.config import first_problem
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import Tokenizer, full_tokenizer

SIZE, CONTEXT, GLOBAL_BATCH, PER_STEP = 8, 40, 7, 3
TOKENIZER = Tokenizer(full_tokenizer({"context_length": CONTEXT}), shorten=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs, and 18 documents in uneven shards."""
    folder = tmp_path_factory.mktemp("data")
    write_source(folder, [9, 12], "pairs")
    write_documents(folder, [5, 11, 2])
    return folder


def config(folder: Path, documents: dict[str, Any] | None, **fields: Any) -> DataConfig:
    with_documents = {"sources": {"web": {"shards": "docs-*.tar"}}, "per_step": PER_STEP, **(documents or {})}
    return DataConfig.model_validate(
        {
            "root": str(folder),
            "sources": {"pairs": {"shards": "pairs-*.tar"}},
            "workers": 0,
            "documents": None if documents is None else with_documents,
            **fields,
        }
    )


def stream(
    folder: Path,
    documents: dict[str, Any] | None = None,
    *,
    world: World | None = None,
    global_batch: int = GLOBAL_BATCH,
    record: Path | None = None,
    **fields: Any,
) -> TrainStream:
    data = config(folder, documents, **fields)
    return TrainStream(
        data,
        ImageSpec(size=SIZE),
        TOKENIZER,
        global_batch=global_batch,
        seed=0,
        world=world or World(),
        record=record,
    )


def parts_of(batch: Batch) -> tuple[Documents, Images]:
    documents, images = batch.parts[DOCUMENTS], batch.parts[DOCUMENT_IMAGES]
    assert isinstance(documents, Documents)
    assert isinstance(images, Images)
    return documents, images


def assert_same_part(ours: BatchPart, theirs: BatchPart) -> None:
    for name in fields_of(ours):
        mine, other = getattr(ours, name.name), getattr(theirs, name.name)
        assert (mine is None and other is None) or torch.equal(mine, other), name.name


def test_a_step_has_the_documents_that_are_stored(folder: Path) -> None:
    data = stream(folder, {})
    summary = data.sources[-1]
    assert [source.name for source in data.sources] == ["pairs", "documents/web"]
    assert (summary.num_shards, summary.num_samples, summary.fraction) == (3, 18, 1.0)
    batches = list(data.batches(0, 6))
    assert sorted(key for batch in batches for key in batch.document_keys) == [f"doc{n:04d}" for n in range(18)]
    for batch in batches:
        documents, images = parts_of(batch)
        numbers = [int(key.removeprefix("doc")) for key in batch.document_keys]
        owners = [slot * GLOBAL_BATCH // PER_STEP for slot in range(PER_STEP)]
        assert documents.owners is not None
        assert documents.owners.tolist() == owners
        assert documents.num_images.tolist() == [num_images(number) for number in numbers]
        shown = [
            (owner, number, place)
            for owner, number in zip(owners, numbers, strict=True)
            for place in range(num_images(number))
        ]
        assert images.owners is not None
        assert images.owners.tolist() == [owner for owner, _, _ in shown]
        expected = torch.tensor([colour(number, place) for _, number, place in shown], dtype=torch.uint8)
        assert torch.equal(images.pixels, expected[:, :, None, None].expand(-1, 3, SIZE, SIZE))
        for row, number in enumerate(numbers):
            plain = TOKENIZER([text_of(number).replace("<image>", " ")])
            length = int(plain.lengths[0])
            assert documents.tokens[row, :length].tolist() == plain.tokens[0].tolist()
            assert int(documents.lengths[row]) == length
            front = number % 2 == 1
            assert documents.seen_to[row, 0] == int(front)
            assert documents.seen_to[row, length - 2] == num_images(number)
        assert batch.counts["documents/web"] == PER_STEP


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("per_step", [1, PER_STEP, 10])
def test_a_global_batch_is_the_same_at_any_world_size(folder: Path, world_size: int, per_step: int) -> None:
    whole = list(stream(folder, {"per_step": per_step, "images_seen": "all"}).batches(2, 2))
    ranks = [
        list(stream(folder, {"per_step": per_step, "images_seen": "all"}, world=World(rank, world_size)).batches(2, 2))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        together = Batch.cat([rank[step] for rank in ranks])
        assert (together.keys, together.document_keys) == (batch.keys, batch.document_keys)
        for name in (DOCUMENTS, DOCUMENT_IMAGES, "image"):
            assert_same_part(together.parts[name], batch.parts[name])
        samples = [batch.take(sample, sample + 1) for sample in range(len(batch))]
        for name in (DOCUMENTS, DOCUMENT_IMAGES):
            assert_same_part(Batch.cat(samples).parts[name], batch.parts[name])


def test_documents_follow_neither_the_pairs_nor_the_pairs_them(folder: Path) -> None:
    beside = list(stream(folder, {}).batches(1, 3))
    alone = list(stream(folder).batches(1, 3))
    other = list(stream(folder, {}, global_batch=4).batches(1, 3))
    for with_documents, without, fewer in zip(beside, alone, other, strict=True):
        assert with_documents.keys == without.keys
        assert torch.equal(with_documents.pixels, without.pixels)
        assert DOCUMENTS not in without.parts
        assert fewer.document_keys == with_documents.document_keys
        mine, theirs = parts_of(with_documents), parts_of(fewer)
        assert torch.equal(mine[0].tokens, theirs[0].tokens)
        assert torch.equal(mine[1].pixels, theirs[1].pixels)


def test_workers_send_the_same(folder: Path) -> None:
    here, sent = list(stream(folder, {}).batches(0, 3)), list(stream(folder, {}, workers=2).batches(0, 3))
    for one, other in zip(here, sent, strict=True):
        assert one.parts.keys() == other.parts.keys()
        for name, part in one.parts.items():
            assert_same_part(part, other.parts[name])


def test_bad_documents_are_replaced_and_told_and_their_substitutes_kept(tmp_path: Path) -> None:
    write_source(tmp_path, [9], "pairs")
    write_documents(tmp_path, [8])
    broken = {
        "places": document(100, text="a <image> and <image> and <image>"),
        "no-text": document(101, text="<image><image><image>"),
        "elsewhere": document(102, images=["../../doc0000.0.png"]),
        "missing": document(102, images=["9.png"]),
        "unreadable": {**document(102), "0.png": plain_picture(1, 1)[:40]},
        "no-json": {**document(102), "json": b"{"},
    }
    write_shard(tmp_path / "docs-99.tar", [{**one, "__key__": name} for name, one in broken.items()])
    record = tmp_path / "run"
    data = stream(tmp_path, {}, record=record)
    batches = list(data.batches(0, 14 // PER_STEP + 1))
    skipped = {skip.key: skip for batch in batches for skip in batch.skipped}
    assert skipped.keys() == broken.keys()
    reasons = {
        "places": "3 places of images, and its json names 2 images",
        "no-text": "it has no text",
        "elsewhere": "names an image '../../doc0000.0.png', which is not among its members",
        "missing": "names an image '9.png', which is not among its members",
        "unreadable": "image",
        "no-json": "its json cannot be read",
    }
    for key, skip in skipped.items():
        assert skip.source == "documents/web"
        assert reasons[key] in skip.reason
        assert skip.substitute.startswith(str(tmp_path / "docs-"))
    assert all(len(batch.document_keys) == PER_STEP for batch in batches)
    state = data.state(0)
    assert len(state["document_substitutions"]) >= len(broken)
    assert state["substitutions"] == []
    resumed = stream(tmp_path, {}, world=World(1, 2))
    resumed.restore(state)
    again = list(resumed.batches(2, 2))
    for batch, whole in zip(again, batches[2:], strict=False):
        own = slice(-len(batch.document_keys), None)
        assert batch.document_keys == whole.document_keys[own]


@pytest.mark.parametrize(
    ("documents", "fields", "message"),
    [
        ({"max_tokens": 41}, {}, r"data\.documents\.max_tokens: 41 is more than .* context of 40 tokens"),
        ({"lanes": 2}, {}, r"data\.documents\.lanes: 2 does not divide the documents of 3; nearest: 1"),
        (
            {"sources": {"web": {"shards": "pairs-*.tar"}}},
            {},
            r"data\.documents\.sources\.web: no document in .*pairs-00\.tar and 1 more: one has a json member",
        ),
        (
            {"sources": {"web": {"shards": "none-*.tar"}}},
            {},
            r"data\.documents\.sources\.web\.shards: ",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    folder: Path, documents: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        stream(folder, documents, **fields)
    assert "\n" not in str(caught.value)


def test_documents_that_an_earlier_version_indexed_as_samples_without_an_image_are_found(tmp_path: Path) -> None:
    write_source(tmp_path, [9], "pairs")
    write_documents(tmp_path, [2, 3])
    index = FolderIndex(ShardCache(), "x")
    entries = {}
    for name in (tmp_path / "docs-00.tar", tmp_path / "docs-01.tar"):
        new = Indexer(index.cache, "x")(str(name))
        problems = tuple(Problem(new.key(row), "it has no image, only json, 0.png") for row in range(len(new)))
        old = Header(
            bytes=new.header.bytes,
            version=new.header.version,
            statistics=ShardStatistics(),
            problems=problems,
            content="a",
        )
        nothing = {field: getattr(new, field)[:0] for field in ("ids", "key_ends", "keys", "offsets", "sizes")}
        save_index(ShardIndex(old, **nothing), Path(f"{name}.idx"))
        entries[name.name] = ShardEntry.of(ShardIndex(old, **nothing))
    del entries["docs-01.tar"]  # of one, the sidecar alone is old
    (tmp_path / NAME).write_bytes(manifest_bytes(FolderManifest(entries)))
    data = stream(tmp_path, {})
    assert (data.sources[-1].num_samples, data.problems) == (5, ())


def test_a_sequential_stream_has_no_documents(folder: Path) -> None:
    with pytest.raises(ValueError, match="documents need mode: indexed") as caught:
        config(folder, {}, mode="sequential")
    assert "documents need mode" in first_problem(caught.value, DataConfig)  # type: ignore[arg-type]


def test_pairs_are_no_documents_and_documents_no_pairs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no caption field in .*docs-00\.tar"):
        stream(folder, None, sources={"pairs": {"shards": "docs-*.tar"}})
    write_shard(tmp_path / "docs-00.tar", [document(1), sample(2)])
    write_source(tmp_path, [9], "pairs")
    batches = list(stream(tmp_path, {"per_step": 1}).batches(0, 2))
    assert {batch.document_keys for batch in batches} == {("doc0001",)}


def test_degraded_copies_lie_between_the_images_of_pairs_and_those_of_documents(folder: Path) -> None:
    """Each part has its own pixels, whatever else is there."""
    plain = list(stream(folder, {}).batches(0, 3))
    degraded = {"by": {"blur": {}}, "strength": [0.0, 0.0], "share": 0.6}
    for workers in (0, 1):
        both = list(stream(folder, {}, degraded=degraded, workers=workers).batches(0, 3))
        for batch, expected in zip(both, plain, strict=True):
            assert torch.equal(batch.pixels, expected.pixels)
            assert torch.equal(parts_of(batch)[1].pixels, parts_of(expected)[1].pixels)
            copies = batch.parts[DEGRADED]
            assert isinstance(copies, Images)
            assert torch.equal(copies.pixels, batch.pixels[batch.owners(DEGRADED)])
