"""`vlm data counting`: from the command line, with a detector on one rank and two, and on photographs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.counting_options import BalanceOptions, DetectionOptions
from launch.counting_set import make_counting_set
from launch.main import app
from tests.data.counting.sets import WORDS, expected, kept_in, tars_of
from tests.data.counting.tiny_detector import save_tiny_detector, seen_by_library
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import SAMPLE, picture, sample, with_json, write_shard
from tests.ranks import run_ranks
from vlm.errors import UserError

PHOTOGRAPHS = os.environ.get("VLM_TEST_DATA")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", "counting", *words], standalone_mode=False)


def table_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_the_command_writes_the_set_and_says_what_became_of_each_number(tmp_path: Path) -> None:
    shown = [("two dogs", {"dog": 2})] * 3 + [
        ("nine cups", {"cup": 9}),
        ("nine cups", {"cup": 8}),
        ("a dog", {"dog": 1}),
    ]
    samples = [with_json(n, captions=[text], counts=counts) for n, (text, counts) in enumerate(shown)]
    write_shard(tmp_path / "web-0.tar", samples[:4])
    write_shard(tmp_path / "web-1.tar", samples[4:])
    names = [str(tmp_path / "web-[01].tar"), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    done = run(*names, "--detections", "json:counts")
    assert done.exception is None, done.output
    rows = table_of(done.stdout)
    assert rows["samples"] == ["3", *["0"] * 6, "2", "0"]
    assert rows["count differs"] == [*["0"] * 7, "1", "0"]
    assert rows["balance"] == ["2", *["0"] * 8]
    assert rows["kept"] == ["1", *["0"] * 6, "1", "0"]
    assert "of 6 samples: 1 no number" in done.stdout
    assert "at most 1 of each of 2 to 6 are kept, by the most frequent of 7 to 10" in done.stdout
    assert sorted(one["number"] for one in kept_in(tmp_path / "out").values()) == [2, 9]
    assert not (tmp_path / "out/web-1.tar").exists()
    assert json.loads((tmp_path / "figures.json").read_text())["kept_at_most"] == 1
    before = tars_of(tmp_path / "out")
    assert run(*names, "--detections", "json:counts").exception is None
    assert tars_of(tmp_path / "out") == before
    assert "is now 'none'" in str(run(*names, "--captions-only").exception)


def make(shards: str, detector: str, out: Path) -> None:
    detection = DetectionOptions(detector=f"transformers:{detector}", batch_size=3)
    make_counting_set([shards], detection, BalanceOptions(out, most_per_number=1000))


@pytest.mark.slow
def test_a_detector_on_two_ranks_keeps_what_the_library_sees_of_each_picture(tmp_path: Path) -> None:
    detector = save_tiny_detector(tmp_path / "detector")
    pictures = [picture(number, (64, 32) if number % 3 else (32, 32)) for number in range(24)]
    seen = seen_by_library(detector, pictures)
    samples: list[SAMPLE] = []
    right = set()
    for number, counts in enumerate(sorted(one.values(), reverse=True) for one in seen):
        said = counts[number % 2 if len(counts) > 1 else 0]  # of the second class, where that is as frequent, too
        if not 2 <= said <= 10:
            continue
        samples.append(sample(number, jpg=pictures[number], txt=f"{WORDS[said - 2]} things"))
        right |= {f"{number:06d}"} if said == counts[0] else set()
    for start in range(3):
        write_shard(tmp_path / f"web-{start}.tar", [*samples[start::3], sample(90 + start, jpg=b"", txt="two things")])
    assert 5 < len(right) < len(samples) - 5
    arguments = (str(tmp_path / "web-*.tar"), str(detector))
    make(*arguments, tmp_path / "one")
    assert set(kept_in(tmp_path / "one")) == right
    ledger = (tmp_path / "one/counting-ledger.jsonl").read_text()
    assert [json.loads(line)["key"] for line in ledger.splitlines()] == ["000090", "000091", "000092"]
    detections = tmp_path / "one/counting-detections.jsonl"
    lines = {line["key"]: line["counts"] for line in map(json.loads, detections.read_text().splitlines())}
    assert lines == {str(one["__key__"]): seen[int(str(one["__key__"]))] for one in samples}
    again = [arguments[0], "--detections", str(detections), "--out", str(tmp_path / "again")]
    assert run(*again, "--most-per-number", "1000").exception is None
    assert tars_of(tmp_path / "again") == tars_of(tmp_path / "one")
    run_ranks(make, 2, *arguments, tmp_path / "two", group=False)
    files = ["counting.json", "counting-ledger.jsonl", "counting-detections.jsonl"]
    assert [(tmp_path / "two" / name).read_bytes() for name in files] == [
        (tmp_path / "one" / name).read_bytes() for name in files
    ]
    assert tars_of(tmp_path / "two") == tars_of(tmp_path / "one")
    journal = tmp_path / "two/counting-journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))  # killed after two parts
    for tar in (tmp_path / "two").glob("*.tar"):
        tar.unlink()
    make(*arguments, tmp_path / "two")
    assert tars_of(tmp_path / "two") == tars_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of --detections, --detector, --captions-only is needed: none of them is given"),
        (["--captions-only", "--detections", "json:counts"], "found --detections and --captions-only"),
        (["--detections", "json:"], "--detections json: names no field"),
        (["--detections", "none.jsonl"], "--detections: none.jsonl cannot be read"),
        (["--detections", "s3://a/b.jsonl"], "--detections: 's3://a/b.jsonl' is no local path"),
        (["--detections", "json:counts", "--join", "name"], "--join: means nothing with --detections json:counts"),
        (["--captions-only", "--min-score", "0.2"], "--min-score: means nothing with --captions-only"),
        (["--detections", "a.jsonl", "--batch-size", "2"], "--batch-size: means nothing with --detections"),
        (["--detector", "timm:x"], "--detector timm:x: a detector is named as transformers:PATH"),
        (["--detector", "transformers:none"], "--detector none: there is no such folder"),
        (["--detector", "transformers:"], "--detector: the path is empty"),
        (
            ["--detections", "json:count"],
            "--detections json:count: no sample has this field (sample 000000: nearest: counts",
        ),
    ],
)
def test_wrong_commands_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "web.tar", [with_json(0, captions=["two dogs"], counts={"dog": 2})])
    done = run("web.tar", "--out", "new", *words)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_a_set_is_never_written_over_its_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "web.tar", [with_json(0, captions=["two dogs"], counts={"dog": 2})])
    done = run("web.tar", "--out", ".", "--captions-only")
    assert "web.tar would be replaced by its own copy" in str(done.exception)


@pytest.mark.skipif(PHOTOGRAPHS is None, reason="VLM_TEST_DATA names no folder with coco-mini")
def test_of_photographs_those_are_kept_whose_annotations_agree(tmp_path: Path) -> None:
    shards = sorted(Path(PHOTOGRAPHS or "").glob("coco-mini-*.tar"))
    truth = {str(one["__key__"]): json.loads(one["json"]) for shard in shards for one in read_by_webdataset(shard)}
    out = ["--out", str(tmp_path / "out"), "--most-per-number", "1000"]
    assert run(*map(str, shards), "--detections", "json:counts", *out).exception is None
    wanted = {key: expected(one["captions"], one["counts"]) for key, one in truth.items()}
    assert {key: (one["number"], one["captions"]) for key, one in kept_in(tmp_path / "out").items()} == {
        key: one for key, one in wanted.items() if one is not None
    }
    boxes = json.loads((shards[0].parent / "coco-mini-boxes.json").read_text())
    lines = []
    for key, one in boxes.items():
        crowds = {thing["category"] for thing in one if thing["crowd"]}
        labels = [{"label": thing["category"]} for thing in one if thing["category"] not in crowds]
        lines.append(json.dumps({"source_name": truth[key]["source_name"], "detections": labels}) + "\n")
    (tmp_path / "boxes.jsonl").write_text("".join(lines))
    by_file = ["--detections", str(tmp_path / "boxes.jsonl"), "--join", "source_name", "--most-per-number", "1000"]
    assert run(*map(str, shards), *by_file, "--out", str(tmp_path / "by-file")).exception is None
    assert tars_of(tmp_path / "by-file") == tars_of(tmp_path / "out")
