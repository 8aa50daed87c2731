"""Every kind of source becomes the samples that it describes, judged by webdataset's own reader."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert.builder import BuildOptions, BuildSummary, build_shards
from data.convert.columns import ColumnOptions
from data.convert.source import BuildSource, open_table
from data.convert.table import Groups
from tests.data.convert.pictures import encoded, picture, read_shards, write_pictures
from vlm.errors import UserError

IN_ORDER = BuildOptions(shuffle=None, max_bad_share=1)
FLICKR = ["a dog runs .", 'a "brown" dog', "two dogs | one ball"]


def build(tmp_path: Path, source: BuildSource) -> list[dict[str, Any]]:
    build_summary(tmp_path, source)
    return read_shards(tmp_path / "shards")


def build_summary(tmp_path: Path, source: BuildSource) -> BuildSummary:
    return build_shards(source, tmp_path / "shards", IN_ORDER, workers=1)


def captions_of(samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {sample["json"]["file_name"]: sample["json"]["captions"] for sample in samples}


def test_open_clips_own_csv(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 3)
    rows = {"filepath": [f"images/{name}" for name in names], "title": ["one", 'say "hi"', "tab\there\nand a line"]}
    table = tmp_path / "train.csv"
    with table.open("w", newline="") as file:  # as pandas' to_csv(sep="\t") writes it
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(rows)
        writer.writerows(zip(*rows.values(), strict=True))
    samples = build(tmp_path, BuildSource(str(table)))
    assert [sample["json"]["captions"] for sample in samples] == [[title] for title in rows["title"]]
    assert [sample["jpg"] for sample in samples] == [(tmp_path / "images" / name).read_bytes() for name in names]
    assert samples[0]["json"] == {"captions": ["one"], "file_name": "images/000.jpg", "width": 24, "height": 16}


def test_other_columns_stay_in_the_json_with_their_types(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 2)
    (tmp_path / "t.csv").write_text(
        "id,Image Path,caption,similarity,code,label,width,note\n"
        '1,000.jpg,"A dog, running",0.25,007,3,640,\n'
        "2,001.jpg,A cat,0.5,12,0,24,x\n"
    )
    samples = build(tmp_path, BuildSource(str(tmp_path / "t.csv"), root=tmp_path / "images"))
    assert samples[0]["json"] == {
        "captions": ["A dog, running"],
        "file_name": "000.jpg",
        "width": 24,
        "height": 16,
        "id": 1,
        "similarity": 0.25,
        "code": "007",
        "table_width": 640,
        "note": None,
    }
    assert "table_width" not in samples[1]["json"]
    assert [sample["cls"] for sample in samples] == [b"3", b"0"]


def test_several_caption_columns_stay_apart_too(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    line = {"img": "000.jpg", "alt": "alt text", "made": ["synthetic", "another"], "nested": {"a": [1, None]}}
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    column_options = ColumnOptions(captions=("made", "alt"))
    (sample,) = build(tmp_path, BuildSource(str(tmp_path / "t.jsonl"), columns=column_options))
    assert sample["json"]["captions"] == ["synthetic", "another", "alt text"]
    assert (sample["json"]["alt"], sample["json"]["made"]) == ("alt text", ["synthetic", "another"])
    assert sample["json"]["nested"] == {"a": [1, None]}


def test_json_lines_with_lines_that_are_none(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    good = [json.dumps({"path": f"{n:03d}.jpg", "text": f"ünï {n}"}, ensure_ascii=False) for n in range(3)]
    lines = [good[0].encode(), b"", b'{"path": ', good[1].encode(), b"[1]", b'{"path": "\xff"}', good[2].encode()]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "t.jsonl")))
    assert captions_of(read_shards(summary.folder)) == {f"{n:03d}.jpg": [f"ünï {n}"] for n in range(3)}
    ledger = [json.loads(line) for line in (summary.folder / "build-ledger.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in ledger] == [1, 3, 4]
    assert all("JSON" in entry["reason"] for entry in ledger)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_with_paths_in_several_files(tmp_path: Path, kind: pa.DataType) -> None:
    names = write_pictures(tmp_path, 4)
    for part in range(2):
        mine = names[2 * part : 2 * part + 2]
        columns = {"jpg": pa.array(mine, kind), "captions": [[name, "and"] for name in mine], "score": [0.5, None]}
        pq.write_table(pa.table(columns), tmp_path / f"part-{part}.parquet")
    samples = build(tmp_path, BuildSource(str(tmp_path / "part-*.parquet")))
    assert captions_of(samples) == {name: [name, "and"] for name in names}
    assert [sample["json"]["score"] for sample in samples] == [0.5, None, 0.5, None]


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_bytes(tmp_path: Path, nested: bool) -> None:
    images = [encoded(picture(n), "PNG" if n % 3 == 0 else "JPEG") for n in range(11)]
    stored: list[Any] = (
        [{"bytes": image, "path": f"{n}.img"} for n, image in enumerate(images)] if nested else [*images]
    )
    texts = [f"caption {n}" for n in range(11)]
    table = pa.table({"image": stored, "text": texts, "thumbnail": images, "label": list(range(11))})
    (tmp_path / "data").mkdir()
    pq.write_table(table.slice(0, 7), tmp_path / "data" / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(7), tmp_path / "data" / "b.parquet", row_group_size=3)
    options = BuildOptions(samples_per_shard=4)
    summary = build_shards(BuildSource(str(tmp_path / "data")), tmp_path / "shards", options, workers=1)
    samples = read_shards(tmp_path / "shards")
    assert {sample["json"]["captions"][0]: sample.get("jpg", sample.get("png")) for sample in samples} == dict(
        zip(texts, images, strict=True)
    )
    assert all(sample["json"]["captions"] == [f"caption {sample['cls'].decode()}"] for sample in samples)
    assert [sample["json"]["captions"] for sample in samples] != [[text] for text in texts]
    assert summary.left_out == ("thumbnail",)
    assert {sample["json"]["file_name"] for sample in samples} == ({f"{n}.img" for n in range(11)} if nested else {""})
    assert not list((tmp_path / "shards").glob(".*"))


def test_parquet_structs_without_bytes_name_a_file(tmp_path: Path) -> None:
    (name,) = write_pictures(tmp_path, 1)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": name}, None, {"bytes": encoded(picture(5)), "path": None}], kind)
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"]}), tmp_path / "t.parquet")
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "t.parquet")))
    samples = read_shards(summary.folder)
    assert [sample["jpg"] for sample in samples] == [(tmp_path / name).read_bytes(), encoded(picture(5))]
    assert summary.reasons == {"it names no image": 1}


def test_coco_captions(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "val", 3, "COCO_val_{:012d}.jpg")
    images = [
        {"id": 70 + n, "file_name": name, "license": n, "width": 24, "height": 16} for n, name in enumerate(names)
    ]
    notes = [{"id": i, "image_id": 70 + i % 2, "caption": f"caption {i}\n"} for i in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "captions.json"), root=tmp_path / "val"))
    samples = read_shards(summary.folder)
    assert [sample["json"] for sample in samples] == [
        {"captions": [f"caption {i}" for i in range(n, 5, 2)], "file_name": names[n]}
        | {"width": 24, "height": 16, "image_id": 70 + n, "license": n}
        for n in range(2)
    ]
    assert summary.reasons == {"it has no caption, or only empty ones": 1}


@pytest.mark.parametrize(
    "lines",
    [
        ["{name}#{n}\t{text}"],
        ["image_name| comment_number| comment", "{name}| {n}| {text}"],
        ["{name}|{n}|{text}"],
        ["{name}\t{text}"],
        ["image,caption", "{name},{text}"],
    ],
)
def test_captions_files_of_flickr(tmp_path: Path, lines: list[str]) -> None:
    names = write_pictures(tmp_path / "images", 3)
    texts = FLICKR if "|" not in lines[-1] else FLICKR[:2]
    rows = [lines[-1].format(name=name, n=n, text=text) for name in names for n, text in enumerate(texts)]
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join([*lines[:-1], *rows]))
    samples = build(tmp_path, BuildSource(str(tmp_path / "images"), captions=captions))
    assert captions_of(samples) == dict.fromkeys(names, texts)


def test_a_csv_with_a_row_a_caption(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 2)
    file = io.StringIO()
    csv.writer(file).writerows(
        [["image", "caption", "worker"], *([n, t, i] for i, t in enumerate(FLICKR) for n in names)]
    )
    (tmp_path / "captions.txt").write_text(file.getvalue())
    samples = build(tmp_path, BuildSource(str(tmp_path / "images"), captions=tmp_path / "captions.txt"))
    assert captions_of(samples) == dict.fromkeys(names, FLICKR)
    assert samples[0]["json"]["worker"] == [0, 1, 2]


def test_text_files_beside_the_images(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in" / "b", 2)
    write_pictures(tmp_path / "in", 1, "top.jpeg")
    (tmp_path / "in" / "b" / "000.txt").write_text("first\n\nsecond \n")
    (tmp_path / "in" / "top.txt").write_bytes("\ufeffthé\r\n".encode())
    (tmp_path / "in" / "README").write_text("no image")
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "in")))
    assert captions_of(read_shards(summary.folder)) == {"b/000.jpg": ["first", "second"], "top.jpeg": ["thé"]}
    assert summary.num_bad == 1


def test_rows_that_cannot_be_parsed_are_bad_rows(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "t.csv").write_bytes(b"image,caption\n000.jpg,a, b\n001.jpg,caf\xe9\n002.jpg\n003.jpg,fine\n")
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    assert captions_of(read_shards(summary.folder)) == {"003.jpg": ["fine"]}
    assert sorted(reason[:24] for reason in summary.reasons) == [
        "it has no caption, or on",
        "the row has 3 cells, not",
        "the row is not UTF-8",
    ]


OPEN = "a quote of the row is left open"


@pytest.mark.parametrize(
    ("rows", "captions", "bad"),
    [
        # A quote left open, ended by the end of the file, by the next quote, or by an inch.
        (['000.jpg,"a dog', "001.jpg,a cat", "002.jpg,two cats"], {1: "a cat", 2: "two cats"}, [OPEN]),
        (['000.jpg,"a dog', '001.jpg,"a cat, and"', "002.jpg,c"], {1: "a cat, and", 2: "c"}, [OPEN]),
        (['000.jpg,"a dog', '001.jpg,a 5" nail', "002.jpg,c"], {1: 'a 5" nail', 2: "c"}, [OPEN]),
        (["000.jpg,a", "001.jpg,b", '002.jpg,"the last one'], {0: "a", 1: "b"}, [OPEN]),
        (['000.jpg,"over', 'two lines"', "001.jpg,b"], {0: "over\ntwo lines", 1: "b"}, []),
        (
            ['000.jpg,"say ""hi"", or', "say, or", '""no"""', "001.jpg,b"],
            {0: 'say "hi", or\nsay, or\n"no"', 1: "b"},
            [],
        ),
        (['000.jpg,"big" dog', '001.jpg,"b"'], {0: "big dog", 1: "b"}, []),
        (['000.jpg,"' + "x" * 200_000 + '"', "001.jpg,b"], {1: "b"}, ["field larger than field limit"]),
        (["000.jpg,a,", "001.jpg,b,,", "002.jpg,c"], {0: "a", 1: "b", 2: "c"}, []),
    ],
)
def test_a_quote_left_open_costs_its_own_row_alone(
    tmp_path: Path, rows: list[str], captions: dict[int, str], bad: list[str]
) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    expected = {f"{number:03d}.jpg": [caption] for number, caption in captions.items()}
    assert captions_of(read_shards(summary.folder)) == expected
    assert len(summary.reasons) == len(bad)
    assert all(part in reason for part, reason in zip(bad, summary.reasons, strict=True))


def test_a_bad_row_of_an_image_that_has_others_is_told_too(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text('image,caption\n000.jpg,a\n000.jpg,"b\n000.jpg,c\n')
    summary = build_summary(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    assert captions_of(read_shards(summary.folder)) == {"000.jpg": ["a", "c"]}
    assert summary.num_bad == 1


def test_columns_without_a_name_are_called_by_their_place(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    pandas_table = pl.DataFrame({"": [0, 1], "image": ["000.jpg", "001.jpg"], "caption": ["a", "b"]})
    pandas_table.write_csv(tmp_path / "t.csv")
    samples = build(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    assert [(sample["json"]["captions"], sample["json"]["unnamed_1"]) for sample in samples] == [(["a"], 0), (["b"], 1)]


def test_a_separator_at_the_end_of_each_line_is_no_column(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text("image,caption,,\n000.jpg,a,,\n001.jpg,b,,\n")
    samples = build(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    assert [sample["json"]["captions"] for sample in samples] == [["a"], ["b"]]
    assert not any(name.startswith("unnamed") for sample in samples for name in sample["json"])


def test_halves_of_surrogate_pairs_and_names_that_are_no_utf8_do_no_harm(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "in", 2)
    odd = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    (tmp_path / "in" / names[1]).rename(tmp_path / "in" / odd)
    rows = [
        {"image": names[0], "caption": "half \ud83d of a pair", "note": "\udc00", "captions": ["a", None]},
        {"image": odd, "caption": "b"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = BuildSource(
        str(tmp_path / "t.jsonl"), root=tmp_path / "in", columns=ColumnOptions(captions=("caption", "captions"))
    )
    samples = build(tmp_path, source)
    assert [sample["json"]["captions"] for sample in samples] == [["half \ufffd of a pair", "a"], ["b"]]
    (tmp_path / "in" / "000.txt").write_text("one\u2028line\x85still\nanother")
    folder = build_shards(BuildSource(str(tmp_path / "in")), tmp_path / "folder", IN_ORDER, workers=1).folder
    assert read_shards(folder)[0]["json"]["captions"] == ["one\u2028line\x85still", "another"]


def test_rows_of_the_same_image_are_one_sample_in_the_place_of_the_first() -> None:
    paths = ["b", "a", None, "b", "c", None, "a", "b"]
    expected: dict[object, list[int]] = {}
    for row, path in enumerate(paths):
        expected.setdefault(path or row, []).append(row)
    groups = Groups(pl.Series(paths, dtype=pl.String), len(paths))
    assert [groups.rows(sample).tolist() for sample in range(len(groups))] == list(expected.values())


@pytest.mark.parametrize(
    ("content", "column_options", "message"),
    [
        ("picture,caption\na,b\n", ColumnOptions(), "no column of images .* among picture, caption .*--image-column"),
        ("image,words\na,b\n", ColumnOptions(), "no column of captions .* among image, words"),
        ("url,caption\nhttps://a/b.jpg,b\n", ColumnOptions(), "url holds addresses, which are not fetched"),
        ("image,caption\nhttps://a/b.jpg,b\n", ColumnOptions(), "image holds addresses .*not fetched"),
        (
            "image,caption\n000.jpg,b\n",
            ColumnOptions(captions=("captoin",)),
            "captoin: .* only image, caption .*nearest: caption",
        ),
        (
            "image,caption\nno.jpg,b\n",
            ColumnOptions(),
            "none of 1 images looked for is there, such as .*no.jpg.*--root",
        ),
        ("image,caption,caption\n000.jpg,b,b\n", ColumnOptions(), "names the column 'caption' twice"),
        ("image,caption\n", ColumnOptions(), "holds no rows"),
        ("", ColumnOptions(), "is empty"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, content: str, column_options: ColumnOptions, message: str
) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, BuildSource(str(tmp_path / "t.csv"), columns=column_options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_a_column_called_label_that_holds_words_is_an_ordinary_column(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image,caption,label\n000.jpg,b,cat\n")
    (sample,) = build(tmp_path, BuildSource(str(tmp_path / "t.csv")))
    assert sample["json"]["label"] == "cat"
    assert "cls" not in sample


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("t.csv", b"\xff\xfei\0m\0", "no text in UTF-8"),
        ("t.json", b"{", "is no JSON"),
        ("t.json", b'{"images": [], "annotation": []}', "no 'annotations'.*nearest: annotation"),
        ("t.json", b'{"images": [{"id": 1}], "annotations": []}', "an image without id and file_name"),
        ("t.jsonl", b"no\n", "no JSON object"),
        ("t.xlsx", b"", ".xlsx is no kind of table that is known"),
        ("tabel.csv", None, "tabel.csv: there is no such file .nearest: table.csv"),
        ("none/t.csv", None, "there is no folder"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    (tmp_path / "table.csv").touch()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, BuildSource(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_or_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no image"):
        build(tmp_path, BuildSource(str(tmp_path / "in")))
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(UserError, match="--captions"):
        build(tmp_path, BuildSource(str(tmp_path / "in")))


def test_a_table_is_read_lazily_where_its_format_allows(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"image": "000.jpg", "caption": "first"}) + "\n")
    table = open_table(BuildSource(str(path)))
    path.write_text(json.dumps({"image": "000.jpg", "caption": "later"}) + "\n")
    (row,) = table.fetch(pl.Series([0]).to_numpy())
    assert isinstance(row, dict)
    assert row["caption"] == "later"
