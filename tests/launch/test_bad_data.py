"""With anything wrong with the data a run goes on and says what it skipped and why; it stops only when that is much."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data.config import DataConfig
from data.loading.stream import TrainStream
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from tests.data.http_server import FaultyServer
from tests.data.small_shards import SAMPLE, WordTokenizer, picture, sample, write_shard, write_source
from tests.launch.small import keys_of
from tests.launch.test_bad_input import CommandLine
from tests.launch.tiny import ledger_of, tiny_values, train_here, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.batch import Batch, Skip
from vlm.distributed.world import World
from vlm.model.image_spec import ImageSpec

MAX_PIXELS = 50_000
GOOD = {f"{number:06d}" for number in range(30)}
ATTEMPTS = 4
QUICK = {"attempts": ATTEMPTS, "first_wait": 0.01, "longest_wait": 0.02}


class Kind(NamedTuple):
    """One thing that can be wrong: how its shard is written, what is skipped, and what is usable all the same."""

    write: Callable[[Path], object]
    at_start: tuple[tuple[str, str], ...] = ()  # (key, part of the reason) that are told before the first step
    in_training: tuple[tuple[str, str], ...] = ()
    usable: tuple[str, ...] = ()


def holding(*samples: SAMPLE) -> Callable[[Path], object]:
    return lambda path: write_shard(path, samples)


def write_members(path: Path, *members: tuple[str, bytes]) -> None:
    """A tar with members of any names."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_cut(path: Path) -> None:
    write_shard(path, [sample(number) for number in (90, 91, 92)])
    with tarfile.open(path) as tar:
        last = tar.getmember("000092.jpg")
    os.truncate(path, last.offset_data + last.size // 2)


def write_negative(path: Path) -> None:
    """A tar whose only member claims less than nothing."""
    block = bytearray(tarfile.TarInfo("000090.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[148:156] = b"\xff" * 12, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))


def write_half_zeros(path: Path) -> None:
    write_shard(path, [sample(n, jpg=picture(n, (100, 100)), txt="x") for n in (90, 91, 92)])
    with tarfile.open(path) as tar:
        start = tar.getmember("000091.jpg").offset
    size = path.stat().st_size
    os.truncate(path, start)
    os.truncate(path, size)


def write_two(path: Path) -> None:
    stored = b"".join(write_shard(path, [sample(number)]).read_bytes() for number in (90, 91))
    path.write_bytes(stored)


def containing(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def flipped(stored: bytes) -> bytes:
    """One bit of its middle changed."""
    middle = len(stored) // 2
    return stored[:middle] + bytes([stored[middle] ^ 4]) + stored[middle + 1 :]


def with_fields(number: int, **fields: object) -> SAMPLE:
    return sample(number, jpg=picture(number), json=json.dumps(fields))


ODD_NAME = "caf\udce9 \x1b[31m\x07 [/b] :x:"  # not UTF-8, with commands to a terminal and markup
ODD_KEY = ODD_NAME.replace("\udce9", r"\xe9")
PAIR = (("000050.jpg", picture(50)), ("000050.txt", b"fifty"))
PARTS = (("jpg", picture(51)), ("txt", b"odd"))
KINDS = {
    "a corrupt image": Kind(holding(sample(40, jpg=picture(1)[:200], txt="x")), in_training=(("000040", "decoded"),)),
    "an image of 0 bytes": Kind(holding(sample(41, jpg=b"", txt="x")), in_training=(("000041", "empty (0 bytes)"),)),
    "a decompression bomb": Kind(
        holding(sample(42, png=picture(2, (900, 900), "PNG"), txt="x")), in_training=(("000042", "pixels"),)
    ),
    "a PNG with a flipped bit": Kind(
        holding(sample(61, png=flipped(picture(2, form="PNG")), txt="x")), in_training=(("000061", "decoded"),)
    ),
    "a JPEG that ends early, but in order": Kind(
        holding(sample(62, jpg=picture(2)[:-150] + b"\xff\xd9", txt="x")), in_training=(("000062", "premature end"),)
    ),
    "a key that is no UTF-8, commands to a terminal, markup": Kind(
        lambda path: write_members(path, *((f"{ODD_NAME}.{part}", content) for part, content in PARTS)),
        usable=(ODD_KEY,),
    ),
    "such a key without an image": Kind(
        lambda path: write_members(path, *PAIR, (f"{ODD_NAME}.txt", b"x")),
        at_start=((ODD_KEY, "it has no image, only txt"),),
        usable=("000050",),
    ),
    "classes of 5,000 digits, of 2^63, of no number": Kind(
        holding(
            *(sample(n, jpg=picture(n), txt="x", cls=cls) for n, cls in ((63, "9" * 5_000), (64, 2**63), (65, "x")))
        ),
        in_training=tuple((f"0000{n}", "its cls is no class number") for n in (63, 64, 65)),
    ),
    "captions with null, half a surrogate pair, of 4 MB": Kind(
        holding(
            with_fields(66, captions=["a", None]),
            with_fields(67, caption="half \ud83d of a pair", note="\udc00"),
            sample(68, jpg=picture(2), txt="long " * 800_000),
        ),
        usable=("000066", "000067", "000068"),
    ),
    "json nested without end": Kind(
        holding(sample(69, jpg=picture(2), json="[" * 200_000)), in_training=(("000069", "json cannot be read"),)
    ),
    "an image of one pixel": Kind(holding(sample(43, png=picture(2, (1, 1), "PNG"), txt="x")), usable=("000043",)),
    "no caption": Kind(holding(sample(44, jpg=picture(2))), in_training=(("000044", "no caption"),)),
    "an empty caption": Kind(holding(sample(45, jpg=picture(2), txt=" \n")), in_training=(("000045", "no caption"),)),
    "invalid UTF-8": Kind(holding(sample(46, jpg=picture(2), txt=b"caf\xe9")), in_training=(("000046", "UTF-8"),)),
    "a key that comes twice": Kind(
        holding(sample(47), sample(47)),
        at_start=(("000047", "comes twice"), ("000047", "comes twice")),
        usable=("000047",),
    ),
    "an absolute path": Kind(
        lambda path: write_members(path, *PAIR, ("/etc/x.jpg", picture(3)), ("/etc/x.txt", b"x")),
        at_start=(("/etc/x", "outside the shard"), ("/etc/x", "outside the shard")),
        usable=("000050",),
    ),
    "a path that leaves the shard": Kind(
        lambda path: write_members(path, *PAIR, ("a/../../x.jpg", picture(3))),
        at_start=(("a/../../x", "outside the shard"),),
        usable=("000050",),
    ),
    "a shard of 0 bytes": Kind(containing(b""), at_start=(("", "it is no tar file (it is empty)"),)),
    "a text file": Kind(containing(b"no tar" * 99), at_start=(("", "it is no tar file"),)),
    "a negative size": Kind(write_negative, at_start=(("", "it is no tar file (it begins with a negative size)"),)),
    "a shard of zeros": Kind(containing(bytes(20_480)), at_start=(("", "20,480 zeros"),)),
    "a zero-filled tail": Kind(write_half_zeros, at_start=(("", "zeros follow byte"),), usable=("000090",)),
    "two tars in one": Kind(write_two, at_start=(("", "a second tar?"),), usable=("000090",)),
    "a cut shard": Kind(write_cut, at_start=(("", "cut off"),), usable=("000090", "000091")),
}


def ranks_of(data: dict[str, Any], size: int = 2) -> list[TrainStream]:
    """The streams of two ranks over `data`, with a global batch of 6."""
    defaults = {"workers": 0, "shuffle_shards": 2, "augment": {"max_pixels": MAX_PIXELS}, "retry": QUICK}
    config = DataConfig.model_validate({**defaults, **data})
    spec, tokenizer = ImageSpec(size=16), WordTokenizer()
    return [
        TrainStream(config, spec, tokenizer, global_batch=6, seed=0, world=World(rank, size)) for rank in range(size)
    ]


def one_epoch(ranks: list[TrainStream]) -> list[tuple[Batch, ...]]:
    """Each rank's part of every batch of the first epoch; every rank has its part of each."""
    steps = -(-ranks[0].num_samples // 6)
    parts = [list(rank.batches(0, steps)) for rank in ranks]
    assert [len(part) for part in parts] == [steps, steps]
    assert all(len(batch.keys) == 3 for part in parts for batch in part)
    return list(zip(*parts, strict=True))


def assert_skipped(skips: list[Skip], expected: tuple[tuple[str, str], ...], shard: str) -> None:
    """Each expected (key, reason) and no other key; once an epoch, of which some may be seen a second time."""
    assert sorted({skip.key for skip in skips}) == sorted({key for key, _ in expected})
    for skip in skips:
        assert (skip.source, skip.shard) == ("pairs", shard)
        assert any(skip.key == key and reason in skip.reason for key, reason in expected), skip


def assert_replaced(batches: list[tuple[Batch, ...]], usable: set[str]) -> list[Skip]:
    """Each skip's substitute is in its batch, and every usable sample came; returns the skips."""
    for parts in batches:
        for part in parts:
            assert {skip.substitute.rpartition(":")[2] for skip in part.skipped} <= set(part.keys)
    assert {key for parts in batches for part in parts for key in part.keys} == usable
    return [skip for parts in batches for part in parts for skip in part.skipped]


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_alone_is_skipped_replaced_and_named(tmp_path: Path, name: str) -> None:
    kind, shard = KINDS[name], tmp_path / "part-99.tar"
    kind.write(shard)
    ranks = ranks_of({"sources": {"pairs": {"shards": write_source(tmp_path, [13, 17])}}})
    for rank in ranks:
        assert_skipped(list(rank.problems), kind.at_start, str(shard))
        assert len(rank.problems) == len(kind.at_start)
    assert_skipped(assert_replaced(one_epoch(ranks), GOOD | set(kind.usable)), kind.in_training, str(shard))


def lose(path: Path) -> None:
    path.unlink()


def lock(path: Path) -> None:
    path.chmod(0)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lose, "is not there"),
        pytest.param(
            lock, "may not be read", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
        ),
        (lambda path: os.truncate(path, 3_000), "changed since it was indexed"),
    ],
)
def test_a_shard_that_goes_bad_after_the_start(tmp_path: Path, break_it: Callable[[Path], object], said: str) -> None:
    shard = write_shard(tmp_path / "part-99.tar", [sample(number) for number in (60, 61, 62)])
    ranks = ranks_of({"sources": {"pairs": {"shards": write_source(tmp_path, [13, 17])}}})
    break_it(shard)
    skips = assert_replaced(one_epoch(ranks), GOOD)
    assert_skipped(skips, tuple((f"#{row}", said) for row in range(3)), str(shard))


def remote_shards(server: FaultyServer, cache: Path) -> dict[str, Any]:
    """The shards `part-*.tar` below the server's folder as a source, indexed, but with no copy of them on the node."""
    names = sorted(path.name for path in server.folder.glob("part-*.tar"))
    data = {"sources": {"pairs": {"shards": [server.url(name) for name in names]}}, "cache": {"folder": str(cache)}}
    index = FolderIndex(ShardCache(CacheConfig(folder=str(cache))), "data.sources.pairs")
    index.load_or_build([server.url(name) for name in names], workers=1)
    contents = [(server.folder / name).read_bytes() for name in names]
    for path in cache.rglob("*"):
        if path.is_file() and path.read_bytes() in contents:
            path.unlink()
    return data


def test_a_store_that_is_busy_for_a_while_costs_no_sample(tmp_path: Path) -> None:
    write_source(tmp_path / "store", [13, 17])
    with FaultyServer(tmp_path / "store") as server:
        data = remote_shards(server, tmp_path / "cache")
        ranks = ranks_of(data)
        before = server.requests.total()
        server.fail("part-00.tar", ATTEMPTS - 1)
        assert assert_replaced(one_epoch(ranks), GOOD) == []
        assert server.requests.total() >= before + 3


def test_a_store_that_stays_busy_costs_its_shard(tmp_path: Path) -> None:
    write_source(tmp_path / "store", [13, 17])
    write_shard(tmp_path / "store" / "part-99.tar", [sample(number) for number in (60, 61, 62)])
    with FaultyServer(tmp_path / "store") as server:
        data = remote_shards(server, tmp_path / "cache")
        ranks = ranks_of(data)
        server.fail("part-99.tar", 10_000)
        skips = assert_replaced(one_epoch(ranks), GOOD)
        assert_skipped(skips, tuple((f"#{row}", "503") for row in range(3)), server.url("part-99.tar"))
        # Asked again as often as the recipe says, by each rank, not for each sample.
        assert server.requests.total() < 100


def train_and_tell(recipe: str) -> str:
    """Train on this rank; what it showed of its progress."""
    with redirect_stdout(io.StringIO()) as shown:
        train_here(recipe)
    return shown.getvalue()


@pytest.mark.slow
def test_two_ranks_train_to_the_end_on_all_of_it_mixed(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS.values()):
        (tmp_path / "data").mkdir(exist_ok=True)
        kind.write(tmp_path / "data" / f"part-9{number:02d}.tar")
    write_source(tmp_path / "data", [13, 17])
    write_source(tmp_path / "store", [4, 3, 2, 8], start=70)
    with FaultyServer(tmp_path / "store") as server:
        remote = remote_shards(server, tmp_path / "cache")
        server.fail("part-00.tar", 2)
        server.fail("part-01.tar", 10_000)
        (tmp_path / "store" / "part-02.tar").unlink()
        data = {
            **remote,
            "sources": {"pairs": {"shards": str(tmp_path / "data" / "part-*.tar")}, "web": remote["sources"]["pairs"]},
            "mix": "once",
            "workers": 1,
            "max_bad_share": 1,
            "augment": {"max_pixels": MAX_PIXELS},
            "retry": QUICK,
        }
        recipe = write_tiny_recipe(tmp_path / "data", tmp_path / "run", data=data)
        shown, _ = run_ranks(train_and_tell, 2, recipe, group=False)
        lost = {server.url("part-01.tar"): ("503", 3), server.url("part-02.tar"): ("is not there", 2)}
    ledger = ledger_of(tmp_path / "run")
    assert f"skipped {len(ledger)} " in shown.splitlines()[-1]
    assert r"caf\xe9 \x1b[31m\x07 [/b] :x:" in shown
    assert shown.replace("\n", "").isprintable()
    assert all(line.keys() == {"step", "source", "shard", "key", "reason", "substitute"} for line in ledger)
    at_start = [(line["key"], line["reason"]) for line in ledger if line["step"] == 0]
    expected = [one for kind in KINDS.values() for one in kind.at_start]
    assert len(at_start) == len(expected)
    for key, reason in expected:
        assert any(key == found and reason in told for found, told in at_start)
    later = [line for line in ledger if line["step"]]
    for key, reason in [one for kind in KINDS.values() for one in kind.in_training]:
        assert any(line["source"] == "pairs" and line["key"] == key and reason in line["reason"] for line in later), key
    for shard, (reason, count) in lost.items():
        mine = [line for line in later if line["shard"] == shard]
        assert {line["key"] for line in mine} == {f"#{row}" for row in range(count)}
        assert all(line["source"] == "web" and reason in line["reason"] for line in mine)
    assert_both_ranks_made_every_step(tmp_path / "run", later)


def assert_both_ranks_made_every_step(run: Path, skipped: list[dict[str, Any]]) -> None:
    """Twelve steps of six rows each, the ledger's substitutes among them."""
    for rank in (0, 1):
        records = [json.loads(line) for line in (run / "samples" / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert [(record["step"], len(record["keys"])) for record in records] == [(n, 6) for n in range(1, 13)]
    keys = keys_of(run)
    for line in skipped:
        assert line["substitute"].rpartition(":")[2] in keys[line["step"]]


def test_too_much_of_it_stops_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "data", [20], "train")
    write_shard(tmp_path / "data" / "train-99.tar", [sample(n, jpg=b"", txt="x") for n in range(40, 60)])
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(tiny_values(tmp_path / "data", tmp_path / "run")))
    line = CommandLine(monkeypatch, capsys).refuses("train", str(recipe))
    found = len(ledger_of(tmp_path / "run"))
    assert 10 < found <= 20
    assert line.startswith(f"vlm: data.max_bad_share: {found} of ")
    assert f"more than 1.00% ({found} x pairs: its image is empty (0 bytes))" in line


def test_held_out_samples_that_are_of_no_use_are_named_in_the_ledger_and_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_source(tmp_path, [20], "train")
    bad = [sample(90, jpg=b"", txt="x"), sample(91, jpg=picture(3)), sample(92, txt="alone")]
    held_out = write_shard(tmp_path / "test.tar", [sample(n) for n in range(40, 50)] + bad)
    evaluate = {"val": {"kind": "retrieval", "shards": str(held_out), "every": "1 step"}}
    values = tiny_values(tmp_path, tmp_path / "run", duration="2 steps", schedule={}, evaluate=evaluate)
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps({**values, "data": {**values["data"], "sources": {"pairs": {"shards": pattern}}}}))
    vlm = CommandLine(monkeypatch, capsys)
    code, said = vlm("train", str(recipe))
    assert code == 0, said
    found = [(line["step"], line["source"], line["key"], line["reason"]) for line in ledger_of(tmp_path / "run")]
    assert found == [
        (step, "evaluate:val", key, reason)
        for step in (1, 2)
        for key, reason in (
            ("000090", "its image is empty (0 bytes)"),
            ("000091", "it has no caption"),
            ("000092", "it has no image, only txt"),
        )
    ]
    code, said = vlm("eval", "retrieval", str(tmp_path / "run"), "--data", str(held_out))
    assert code == 0, said
    assert [line for line in said.splitlines() if line.startswith("skipped: ")] == [
        f"skipped: {held_out} {key}: {reason}" for _, _, key, reason in found[:3]
    ]
