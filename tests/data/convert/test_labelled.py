"""Labelled sets from folders and from tables: class numbers in the shards, class names beside them."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert.builder import BuildOptions, BuildSummary, build_shards
from data.convert.columns import ColumnOptions
from data.convert.source import BuildSource
from eval.classes import load_class_prompts
from tests.data.convert.pictures import encoded, picture, read_shards, write_pictures
from vlm.errors import UserError

IN_ORDER = BuildOptions(shuffle=None, max_bad_share=1)
LABELS = ["dog", "cat", "sea lion", "dog"]
SORTED = ("cat", "dog", "sea lion")
ANIMALS = ColumnOptions(label="animal")


def build(tmp_path: Path, source: BuildSource) -> BuildSummary:
    return build_shards(source, tmp_path / "shards", IN_ORDER, workers=1)


def classes_in(folder: Path) -> tuple[str, ...]:
    """As `vlm eval zeroshot --classes` reads them."""
    return load_class_prompts(str(folder / "classes.json"), None, None).names


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the kind that its name says."""
    match path.suffix:
        case ".csv":
            lines = [",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]
            path.write_text("\n".join(lines))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_column_of_names_becomes_numbers_and_a_file_of_names(tmp_path: Path, kind: str) -> None:
    names = write_pictures(tmp_path, 4)
    rows = [{"image": name, "animal": label} for name, label in zip(names, LABELS, strict=True)]
    summary = build(tmp_path, BuildSource(table(tmp_path / f"t.{kind}", rows), columns=ANIMALS))
    samples = read_shards(summary.folder)
    assert [SORTED[int(sample["cls"])] for sample in samples] == LABELS
    assert ["txt" in sample or "captions" in sample["json"] for sample in samples] == [False] * 4
    assert classes_in(summary.folder) == SORTED
    assert (summary.num_samples, summary.num_classes) == (4, 3)


def test_class_folders_are_classes_in_their_sorted_order(tmp_path: Path) -> None:
    for number, label in enumerate(LABELS):
        write_pictures(tmp_path / "in" / label / "deeper", 1, f"{number}.jpg")
    write_pictures(tmp_path / "in" / ".hidden", 1)
    (tmp_path / "in" / "no images").mkdir()
    summary = build(tmp_path, BuildSource(str(tmp_path / "in"), class_folders=True))
    found = {sample["json"]["file_name"]: int(sample["cls"]) for sample in read_shards(summary.folder)}
    assert found == {f"{label}/deeper/{n}.jpg": SORTED.index(label) for n, label in enumerate(LABELS)}
    assert classes_in(summary.folder) == SORTED


def test_a_list_of_classes_gives_their_numbers(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 4)
    order = ["bird", "sea lion", "dog", "cat"]
    (tmp_path / "classnames.txt").write_text("\ufeff" + "\r\n".join(order) + "\r\n", encoding="utf-8")
    rows = [{"image": name, "animal": label} for name, label in zip(names, LABELS, strict=True)]
    source = BuildSource(table(tmp_path / "t.jsonl", rows), columns=ANIMALS, classes=str(tmp_path / "classnames.txt"))
    summary = build(tmp_path, source)
    assert [order[int(sample["cls"])] for sample in read_shards(summary.folder)] == LABELS
    assert classes_in(summary.folder) == tuple(order)


def test_class_numbers_stay_and_captions_go_along(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    rows = [{"image": name, "label": 7 - n, "caption": f"c{n}" if n else None} for n, name in enumerate(names)]
    summary = build(tmp_path, BuildSource(table(tmp_path / "t.parquet", rows)))
    samples = read_shards(summary.folder)
    assert [sample["cls"] for sample in samples] == [b"7", b"6", b"5"]
    assert [sample.get("txt") for sample in samples] == [None, b"c1", b"c2"]
    assert summary.num_classes is None
    assert not (summary.folder / "classes.json").exists()


def test_names_that_a_parquet_file_knows_are_written(tmp_path: Path) -> None:
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(2)]
    known = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    content = pa.table({"image": images, "label": [1, 0]}).replace_schema_metadata({"huggingface": json.dumps(known)})
    pq.write_table(content, tmp_path / "t.parquet")
    summary = build(tmp_path, BuildSource(str(tmp_path / "t.parquet")))
    assert [sample["cls"] for sample in read_shards(summary.folder)] == [b"1", b"0"]
    assert classes_in(summary.folder) == ("cat", "dog")


def test_a_row_without_label_and_caption_is_bad(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    rows = [{"image": name, "animal": label} for name, label in zip(names, ["dog", " ", None], strict=True)]
    summary = build(tmp_path, BuildSource(table(tmp_path / "t.jsonl", rows), columns=ANIMALS))
    assert (summary.num_samples, summary.num_bad) == (1, 2)
    assert classes_in(summary.folder) == ("dog",)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (["1", "cat"], None, "holds numbers and names, such as 'cat'"),
        ([{"a": 1}, {"a": 2}], None, "a label is a class number or a name, found"),
        (["dog", "cta"], ["cat", "dog"], "holds 'cta', which --classes .* has not .nearest: cat"),
        ([0, 2], ["cat", "dog"], "holds class 2, but there are 2 class names"),
        ([0, 1], {"names": ["cat"]}, "unknown key names"),
    ],
)
def test_labels_that_make_no_sense_are_refused_in_one_line(
    tmp_path: Path, labels: list[Any], classes: Any, message: str
) -> None:
    names = write_pictures(tmp_path, 2)
    rows = [{"image": name, "animal": label} for name, label in zip(names, labels, strict=True)]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    file = None if classes is None else str(tmp_path / "classes.json")
    with pytest.raises(UserError, match=message):
        build(tmp_path, BuildSource(table(tmp_path / "t.jsonl", rows), columns=ANIMALS, classes=file))


def test_images_of_a_mac_and_the_files_of_img2dataset_are_read_as_meant(tmp_path: Path) -> None:
    for part in ("00000", "00001"):
        write_pictures(tmp_path / "in" / part, 2)
        for number in range(2):
            (tmp_path / "in" / part / f"{number:03d}.txt").write_text(f"{part} {number}")
            (tmp_path / "in" / part / f"._{number:03d}.JPG").write_bytes(b"\0\5\26\7")
            (tmp_path / "in" / part / f"{number:03d}.json").write_text("{}")
        stored = io.BytesIO()
        pq.write_table(pa.table({"url": ["https://a/b"], "caption": ["x"], "key": ["0"]}), stored)
        (tmp_path / "in" / f"{part}.parquet").write_bytes(stored.getvalue())
    write_pictures(tmp_path / "in" / "__MACOSX", 1)
    summary = build(tmp_path, BuildSource(str(tmp_path / "in")))
    assert (summary.num_samples, summary.num_bad) == (4, 0)
    assert [sample["txt"] for sample in read_shards(summary.folder)] == [b"00000 0", b"00000 1", b"00001 0", b"00001 1"]
