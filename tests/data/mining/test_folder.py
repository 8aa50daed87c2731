"""Mined captions in copies of shards: of others, near ones, the same bytes through any life; all else as it was."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from data.mining.surface import plain, word_edit_likeness
from data.randomness import key_number
from launch.main import app
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.neighbours.folders import source_of, write_text_embeddings
from tests.data.small_shards import picture, sample, with_json, write_shard
from vlm.errors import UserError

COLOURS, THINGS, PLACES = ("red", "blue", "green"), ("dog", "cat", "car", "boat"), ("beach", "road")
CAPTIONS = [f"a {colour} {thing} on the {place}" for colour in COLOURS for thing in THINGS for place in PLACES]
OTHERS = ["beside the sea there is a hound", "on asphalt a vehicle is parked", "a feline in a street"]


def embed(text: str) -> NDArray[np.float64]:
    """Words as random directions: a stand-in for a model that hears words, not their order."""
    words = [np.random.default_rng(int(key_number(word))).normal(size=24) for word in plain(text).split()]
    return np.asarray(np.sum(words, axis=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of captions, some said twice, one sample that has negatives, one that was not embedded."""
    folder = tmp_path_factory.mktemp("mining")
    first = [with_json(n, captions=[CAPTIONS[n], OTHERS[n % 3]], kept=n) for n in range(12)]
    second = [sample(n, jpg=picture(n), txt=CAPTIONS[n]) for n in range(12, 24)]
    second += [sample(24, jpg=picture(24), txt=CAPTIONS[12].upper() + ".")]
    second += [
        with_json(25, captions=["one more red dog"], negatives=["somebody's own"]),
        with_json(26, captions=["x"]),
    ]
    write_shard(folder / "web-0.tar", first)
    write_shard(folder / "web-1.tar", second)
    captions: list[dict[int, list[str]]] = [{n: [CAPTIONS[n], OTHERS[n % 3]] for n in range(12)}, {}]
    captions[1] = {n: [CAPTIONS[12 + n]] for n in range(12)} | {
        12: [CAPTIONS[12].upper() + "."],
        13: ["one more red dog"],
    }
    (folder / "embeddings").mkdir()
    write_text_embeddings(folder / "embeddings", source_of(str(folder / "web-*.tar")).contents, captions, embed)
    return folder


def mine(folder: Path, out: Path, *words: str) -> Any:
    named = [str(folder / "web-*.tar"), "--embeddings", str(folder / "embeddings"), "--out", str(out)]
    return CliRunner().invoke(app, ["data", "negatives", *named, "--candidates", "12", *words], standalone_mode=False)


def stored(out: Path) -> dict[str, dict[str, Any]]:
    samples = [one for shard in sorted(out.glob("*.tar")) for one in read_by_webdataset(shard)]
    return {str(one["__key__"]): json.loads(one["json"]) for one in samples if "json" in one}


def test_negatives_are_captions_of_others_and_all_else_stays(folder: Path, tmp_path: Path) -> None:
    done = mine(folder, tmp_path, "--paraphrases", "2")
    assert done.exception is None, done.output
    fields = stored(tmp_path)
    own = {f"{n:06d}": {CAPTIONS[n], OTHERS[n % 3]} if n < 12 else {CAPTIONS[n]} for n in range(24)}
    all_captions = {plain(text) for text in (*CAPTIONS, *OTHERS, "one more red dog")}
    for key, captions in own.items():
        made = fields[key]
        for side, count in (("negatives", 3), ("paraphrases", 2)):
            assert count <= len(made[side]) <= count * len(captions)
            assert {plain(text) for text in made[side]} <= all_captions - {plain(text) for text in captions}
        assert not set(made["negatives"]) & set(made["paraphrases"])
    assert plain(CAPTIONS[12]) not in {plain(text) for text in fields["000024"]["negatives"]}
    assert fields["000003"]["kept"] == 3
    assert fields["000025"]["negatives"] == ["somebody's own"]
    for name in ("web-0.tar", "web-1.tar"):
        for old, new in zip(*(read_by_webdataset(place / name) for place in (folder, tmp_path)), strict=True):
            assert {part: old[part] for part in old if part != "json"} == {p: new[p] for p in new if p != "json"}
    ledger = [json.loads(line) for line in (tmp_path / "mining-ledger.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in ledger] == [
        ("000025", "its json has a field negatives already"),
        ("000026", "its captions have no embedding"),
    ]
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in done.stdout.splitlines() if "│" in line}
    figures = {name: [float(cell.replace(",", "")) for cell in cells] for name, cells in rows.items()}
    assert figures["negatives"][2] > figures["paraphrases"][2]  # likeness on the surface
    assert figures["negatives"][0] == 3 * (24 + 12 + 2)


def test_the_same_seed_mines_the_same_through_any_life(folder: Path, tmp_path: Path) -> None:
    assert mine(folder, tmp_path / "one").exception is None
    assert mine(folder, tmp_path / "two").exception is None
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")} == files
    (tmp_path / "two/web-1.tar").write_bytes(b"torn")
    before = (tmp_path / "two/web-0.tar").stat().st_ino
    done = mine(folder, tmp_path / "two")
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")} == files
    assert (tmp_path / "two/web-0.tar").stat().st_ino == before
    assert "114" in done.stdout  # negatives of both shards, though one was mined in an earlier life
    assert mine(folder, tmp_path / "other", "--seed", "1").exception is None
    assert (tmp_path / "other/web-0.tar").read_bytes() != files["web-0.tar"]


def test_paraphrases_are_further_on_the_surface_than_plain_draws(folder: Path, tmp_path: Path) -> None:
    """Their expected edit distance exceeds that of a draw by embedding alone, and that of negatives falls below it."""
    distances = {}
    options = {"negatives": ["--count", "4"], "paraphrases": ["--count", "0", "--paraphrases", "4"]}
    for surface in ("edit", "none"):
        for side, words in options.items():
            out = tmp_path / f"{surface}-{side}"
            assert mine(folder, out, "--surface", surface, *words).exception is None
            fields = stored(out)
            pairs = [(plain(CAPTIONS[n]), plain(t)) for n in range(12, 24) for t in fields[f"{n:06d}"][side]]
            distances[surface, side] = np.mean([1 - word_edit_likeness(*pair) for pair in pairs])
    assert distances["edit", "paraphrases"] > distances["none", "paraphrases"]
    assert distances["edit", "negatives"] < distances["none", "negatives"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--surface", "words"], "--surface: unknown 'words'"),
        (["--count", "0"], "--count: found 0, and no --paraphrases"),
        (["--embeddings", "web-0.tar"], "--embeddings: web-0.tar has no embeddings.json"),
        (["--out", "."], "--out: ./web-0.tar would be replaced by its own copy|--out: .*web-0.tar would be replaced"),
        (["--out", "embeddings"], "--out: embeddings holds other files"),
    ],
)
def test_wrong_commands_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = mine(folder, Path("new"), *words)
    assert isinstance(done.exception, UserError), done.exception
    assert re.search(message, str(done.exception)), done.exception
    assert "\n" not in str(done.exception)
    assert not Path("new").exists()
