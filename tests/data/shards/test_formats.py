"""Shards of other programs are read as they are: webdataset's ShardWriter, img2dataset."""

import json
from pathlib import Path

import pytest
import webdataset

from data.config import DataConfig
from data.loading.stream import TrainStream
from tests.data.small_shards import SAMPLE, WordTokenizer, picture, texts, write_shard
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.model.image_spec import ImageSpec


def epoch(shards: str, num_samples: int, **fields: object) -> list[Batch]:
    config = DataConfig.model_validate({"sources": {"a": {"shards": shards}}, "workers": 0, **fields})
    stream = TrainStream(config, ImageSpec(size=16), WordTokenizer(), global_batch=4, seed=0, world=World())
    assert stream.num_samples == num_samples
    return list(stream.batches(0, num_samples // 4))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shard_writers_shards(tmp_path: Path, suffix: str) -> None:
    with webdataset.ShardWriter(str(tmp_path / f"x-%06d.{suffix}"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            image, caption = picture(number), f"caption number {number}"
            writer.write({"__key__": f"folder/{number:04d}", "jpg": image, "txt": caption, "cls": number})
    batches = epoch(str(tmp_path / f"x-*.{suffix}"), 12, cache={"folder": str(tmp_path / "cache")})
    assert sorted(key for batch in batches for key in batch.keys) == [f"folder/{n:04d}" for n in range(12)]
    for batch in batches:
        assert texts(batch.texts.tokens, batch.texts.lengths) == [
            f"caption number {int(key[-4:])}" for key in batch.keys
        ]
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(key[-4:]) for key in batch.keys]


def test_img2datasets_shards(tmp_path: Path) -> None:
    samples: list[SAMPLE] = []
    for number in range(8):
        fields = {
            "caption": f"alt text {number}",
            "url": f"https://example.org/{number}.jpg",
            "key": f"{number:09d}",
            "status": "success",
            "error_message": None,
            "width": 40,
            "height": 32,
            "original_width": 400,
            "exif": "{}",
            "sha256": "0" * 64,
        }
        name = f"{number:09d}"
        samples.append(
            {"__key__": name, "jpg": picture(number), "json": json.dumps(fields), "txt": f"alt text {number}"}
        )
    write_shard(tmp_path / "00000.tar", samples)
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset leaves these beside its shards")
    (tmp_path / "00000_stats.json").write_text("{}")
    for batch in epoch(str(tmp_path / "{00000..00000}.tar"), 8):
        assert texts(batch.texts.tokens, batch.texts.lengths) == [f"alt text {int(key)}" for key in batch.keys]
    for batch in epoch(str(tmp_path / "*.tar"), 8, caption={"fields": {"caption": 1.0}}):
        assert batch.counts == {"source/a": 4, "caption/caption": 4}
