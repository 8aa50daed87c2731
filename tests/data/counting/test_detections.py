"""Files of detections: what they count, and the line that says what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.counting.detections import DetectionFile, read_detections
from vlm.errors import UserError

GOOD = '{"key": "a", "counts": {"dog": 2}}'
COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "val/a.b.jpg"}, {"id": 2, "file_name": "c.jpg", "coco_url": "u"}],
    "annotations": [
        *({"image_id": 1, "category_id": 18, "iscrowd": 0} for _ in range(3)),
        *({"image_id": 1, "category_id": 1} for _ in range(4)),
        {"image_id": 1, "category_id": 1, "iscrowd": 1},
        {"image_id": 1, "category_id": 2, "score": 0.5},
        {"image_id": 1, "category_id": 2, "score": 0.49},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}, {"id": 18, "name": "dog"}],
}


def counts_in(file: DetectionFile) -> dict[str, tuple[int, ...]]:
    return {name: file.all_counts[place] for name, place in file.places.items()}


def read_lines(tmp_path: Path, *lines: str, join: str = "key", min_score: float = 0.5) -> DetectionFile:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines))
    return read_detections(path, join, min_score)


def test_lines_count_each_class_that_is_sure_enough(tmp_path: Path) -> None:
    detections = [
        {"label": "dog", "score": 0.9, "box": [0, 0, 1, 1]},
        {"label": "dog", "score": 0.5},
        {"label": "dog", "score": 0.4999},
        {"label": "cat"},
        {"label": 7, "score": 1},
        {"label": 7, "score": 0.6},
        {"label": 7, "score": 0.7},
    ]
    lines = [
        GOOD,
        "",
        json.dumps({"key": 12, "detections": detections}),
        '{"key": "b", "counts": {"dog": 0, "cat": 1, "cup": 4}}',
        '{"key": "empty", "detections": []}',
    ]
    file = read_lines(tmp_path, *lines)
    assert counts_in(file) == {"a": (2,), "12": (3, 2, 1), "b": (4, 1), "empty": ()}
    assert counts_in(read_lines(tmp_path, *lines, min_score=0.8))["12"] == (1, 1, 1)


def test_coco_counts_no_class_with_a_crowd_and_names_images_as_shards_or_fields_do(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(COCO))
    assert counts_in(read_detections(path, "key", 0.5)) == {"val/a": (3, 1), "c": ()}
    assert set(read_detections(path, "source_name", 0.5).places) == {"val/a.b.jpg", "c.jpg"}
    assert set(read_detections(path, "image_id", 0.5).places) == {"1", "2"}
    assert set(read_detections(path, "coco_url", 0.5).places) == {"val/a.b.jpg", "u"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{cut", ":2: is no JSON"),
        ("[1]", ":2: an object is needed, found [1]"),
        ('{"name": "b", "counts": {}}', ":2: it has no 'key' (choose from: counts, name)"),
        ('{"key": null, "counts": {}}', ":2: key: a text is needed"),
        ('{"key": "a", "counts": {}}', ":2: names 'a' again, after"),
        ('{"key": "b", "count": {}}', ":2: it has neither counts nor detections (nearest: count)"),
        ('{"key": "b", "counts": {}, "detections": []}', ":2: it has both counts and detections"),
        ('{"key": "b", "counts": [2]}', ":2: an object of classes and numbers is needed"),
        ('{"key": "b", "counts": {"dog": 2.5}}', ":2: class 'dog': a number of objects is needed, found 2.5"),
        ('{"key": "b", "counts": {"dog": true}}', ":2: class 'dog'"),
        ('{"key": "b", "counts": {"dog": -1}}', ":2: class 'dog'"),
        ('{"key": "b", "detections": {}}', ":2: detections: a list is needed"),
        ('{"key": "b", "detections": ["dog"]}', ":2: detections: an object with a label is needed"),
        ('{"key": "b", "detections": [{"score": 1}]}', ":2: detections: a label is needed"),
        ('{"key": "b", "detections": [{"label": "dog", "score": "high"}]}', ":2: score: a number is needed"),
        ('{"key": "b", "detections": [{"label": "dog", "score": NaN}]}', ":2: score: a number is needed"),
        ("[" * 2000, ":2: is no JSON (it is nested more than"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_lines(tmp_path, GOOD, line)
    assert f"{tmp_path / 'some.jsonl'}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": None}, "has no list 'annotations'"),
        ({"images": [{"id": 1}]}, "images[0]: file_name: a number or text is needed"),
        ({"images": [{"file_name": "a.jpg"}]}, "images[0]: id: a number or text"),
        ({"images": [*COCO["images"], {"id": 1, "file_name": "d.jpg"}]}, "images[2]: has the id '1' of another"),
        ({"images": [*COCO["images"], {"id": 3, "file_name": "c.png"}]}, "images[2]: names 'c' again, after"),
        ({"annotations": [{"image_id": 9, "category_id": 1}]}, "annotations[0]: image_id: found '9', which nothing"),
        ({"annotations": [{"image_id": 1, "category_id": 9}]}, "annotations[0]: category_id: found '9', which"),
        ({"annotations": [5]}, "annotations[0]: an object is needed"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "score": []}]}, "annotations[0]: score: a number"),
        ({"images": [], "annotations": []}, "is empty"),
    ],
)
def test_a_malformed_entry_of_coco_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({name: value for name, value in {**COCO, **changes}.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        read_detections(path, "key", 0.5)
    assert f"{path}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no.jsonl", "cannot be read"), ("some.csv", "a file of JSON lines"), ("cut.json", "is no JSON")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(UserError, match=f"{name}:? {message}"):
        read_detections(tmp_path / name, "key", 0.5)
