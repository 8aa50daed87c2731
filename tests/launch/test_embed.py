"""`vlm embed`: the model's own embeddings of what can be used, the same bytes from any ranks, batches and lives."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from data.embeddings.embedded import EMBEDDINGS, read_texts, read_vectors
from data.embeddings.parts import open_parts
from data.images.views import evaluation_view
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.source import open_source
from launch.embed import EmbedConfig, embed_shards
from launch.main import app
from launch.model_source import load_model
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.launch.saved import save_checkpoint
from tests.ranks import run_ranks
from tests.vlm.model.tiny import architecture
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.identity import weights_identity

ALL = EmbedConfig(("image", "text"), texts="all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and three shards: one longer than a tile, one with some of all that is wrong, one of texts alone too."""
    folder = tmp_path_factory.mktemp("embed")
    write_shard(folder / "web-0.tar", [with_json(n, captions=[f"a thing {n}", f"number {n}"]) for n in range(70)])
    broken = [
        sample(70, jpg=picture(70)[:90], txt="a broken one"),
        sample(71, jpg=picture(71)),
        sample(72, txt="no image at all"),
        sample(73, jpg=picture(73), txt="a good one"),
    ]
    write_shard(folder / "web-1.tar", broken)
    write_shard(folder / "web-2.tar", [sample(80 + n, jpg=picture(n), txt="again") for n in range(3)])
    # So wide that products of other shapes are not the same to the last bit.
    vision = {"image_size": 16, "layers": 1, "width": 128, "head_width": 32, "patch_size": 8}
    wide = architecture(vision, {"layers": 1}, embed_dim=64)
    save_checkpoint(folder / "run", build_model(ModelConfig.model_validate({"architecture": wide})))
    return folder


def written(folder: Path, out: Path, batch_size: int, config: EmbedConfig = ALL) -> dict[str, bytes]:
    embed_shards(str(folder / "run"), [str(folder / "web-[012].tar")], config, out, batch_size=batch_size)
    return {path.name: path.read_bytes() for path in out.glob("*") if path.name != "embed-journal.jsonl"}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, bytes]:
    return written(folder, folder / "out", 256)


def test_rows_and_vectors_are_those_of_the_model(folder: Path, alone: dict[str, bytes]) -> None:
    assert set(alone) == {*(f"web-{n}.parquet" for n in range(3)), "embeddings.json", "embed-ledger.jsonl"}
    model = load_model(str(folder / "run"))
    parts = open_parts(folder / "out", EMBEDDINGS, "--embeddings")
    assert parts.manifest.model == weights_identity(model)
    assert parts.manifest.dims == {"image": 64, "text": 64}
    source = open_source("any", [str(folder / "web-[012].tar")], FolderIndex(ShardCache(), "SHARDS"))
    records = parts.of_shards(source.contents, "SHARDS")
    assert [record.shard for record in records] == ["web-0.tar", "web-1.tar", "web-2.tar"]
    with torch.no_grad():
        pixels = [torch.from_numpy(evaluation_view(picture(n), model.image_spec).copy()) for n in range(70)]
        images = torch.cat([model.encode_image(one.permute(2, 0, 1)[None]) for one in pixels]).numpy()
        texts = [text for n in range(70) for text in (f"a thing {n}", f"number {n}")]
        vectors = torch.cat([model.encode_text(*model.tokenizer([text])) for text in texts]).numpy()
    first = read_vectors(parts, records[0], "image")
    np.testing.assert_array_equal(first.rows, np.arange(70))
    np.testing.assert_allclose(first.vectors, images, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(first.vectors, axis=1), 1, atol=1e-6)
    all_texts = read_texts(parts, records[0])
    assert all_texts.num_texts.tolist() == [2] * 70
    np.testing.assert_allclose(all_texts.vectors, vectors, atol=1e-5)
    np.testing.assert_array_equal(read_vectors(parts, records[0], "text").vectors, all_texts.vectors[::2])
    assert read_vectors(parts, records[1], "image").rows.tolist() == [2]  # the third sample with an image
    assert pq.read_table(folder / "out/web-1.parquet")["key"].to_pylist() == ["000073"]
    ledger = [json.loads(line) for line in alone["embed-ledger.jsonl"].splitlines()]
    assert [(Path(line["shard"]).name, line["key"]) for line in ledger] == [
        ("web-1.tar", "000070"),
        ("web-1.tar", "000071"),
    ]


def test_neither_ranks_nor_batches_nor_lives_change_a_byte(
    folder: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    assert written(folder, tmp_path / "out", 1) == alone
    (tmp_path / "out/web-0.parquet").unlink()
    (tmp_path / "out/web-2.parquet").write_bytes(b"torn")
    (tmp_path / "out/embeddings.json").unlink()
    assert run_ranks(written, 2, folder, tmp_path / "out", 5, group=False)[0] == alone


def test_texts_alone_are_rows_behind_those_with_images(folder: Path, tmp_path: Path) -> None:
    written(folder, tmp_path / "out", 64, EmbedConfig(("text",), stored="float16"))
    parts = open_parts(tmp_path / "out", EMBEDDINGS, "--embeddings")
    found = read_vectors(parts, parts.manifest.parts[1], "text")
    assert found.rows.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(found.vectors, found.vectors.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=2e-3)
    index = FolderIndex(ShardCache(), "SHARDS")
    for images in (True, False):
        source = open_source("any", [str(folder / "web-[12].tar")], index, images=images)
        assert [record.shard for record in parts.of_shards(source.contents, "x")] == ["web-1.tar", "web-2.tar"]


def test_what_is_damaged_or_of_other_data_is_one_line(folder: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in alone.items():
        (out / name).write_bytes(content)
    flipped = bytearray(alone["web-0.parquet"])
    flipped[1000] ^= 1
    (out / "web-0.parquet").write_bytes(bytes(flipped))
    (out / "web-1.parquet").unlink()
    parts = open_parts(out, EMBEDDINGS, "--embeddings")
    for number, message in ((0, "is damaged: its checksum"), (1, "cannot be read")):
        with pytest.raises(UserError, match=f"^--embeddings: .*web-{number}.parquet {message}"):
            read_vectors(parts, parts.manifest.parts[number], "image")
    write_shard(tmp_path / "web-2.tar", [sample(80, jpg=picture(0), txt="changed")])
    source = open_source("any", [str(tmp_path / "web-2.tar")], FolderIndex(ShardCache(), "SHARDS"))
    with pytest.raises(UserError, match=r"^SHARDS: .*out was made of other samples or texts than web-2.tar holds now"):
        parts.of_shards(source.contents, "SHARDS")
    (out / "embeddings.json").write_bytes(
        alone["embeddings.json"].replace(b'"first"', b'"all"').replace(b"all", b"ALL")
    )
    with pytest.raises(UserError, match="is damaged, or was edited"):
        open_parts(out, EMBEDDINGS, "--embeddings")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "new", "--what", "images"], "--what: unknown 'images'; nearest: image"),
        (["--out", "new", "--stored", "int8"], "--stored: unknown 'int8'"),
        (["--out", "out"], r"out: holds the shards of another embedding \(what was 'image,text', is now 'text'\)"),
        (["--out", "run"], "--out: run holds other files; name a new folder"),
    ],
)
def test_wrong_commands_are_one_line(
    folder: Path,
    alone: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    assert alone
    monkeypatch.chdir(folder)
    words: list[Any] = ["embed", "run", "web-[012].tar", "--what", "text", "--texts", "all"]
    done = CliRunner().invoke(app, [*words, *arguments], standalone_mode=False)
    assert isinstance(done.exception, UserError)
    assert re.search(message, str(done.exception)), done.exception
    assert "\n" not in str(done.exception)
    assert not (folder / "new").exists()
