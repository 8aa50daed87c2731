"""Tables in one JSON document: COCO's captions, or a plain list of objects."""

import hashlib
from pathlib import Path
from typing import Any

from data.convert.columns import ColumnOptions, find_columns
from data.convert.entry import ColumnRoles
from data.convert.table import ListTable
from data.stored_json import parse_json
from vlm.errors import UserError, nearest


def read_json(path: Path, column_options: ColumnOptions) -> ListTable:
    """Read COCO captions ("images" and "annotations" with image_id and caption), or a list of objects as a table.

    Raises:
        UserError: it is no JSON, or neither of the two.
    """
    stored = path.read_bytes()
    fingerprint = hashlib.sha256(stored).hexdigest()
    try:
        document = parse_json(stored)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); name a file of JSON lines .jsonl") from error
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        names = dict.fromkeys(name for row in document for name in row)
        return ListTable(document, find_columns(tuple(names), column_options, path.name), fingerprint)
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds neither COCO captions (images and annotations) nor a list of objects")
    missing = next((key for key in ("images", "annotations") if key not in document), None)
    if missing is not None:
        raise UserError(f"{path}: no {missing!r}, so these are no COCO captions ({nearest(missing, document)})")
    return ListTable(_rows(document, path), ColumnRoles("file_name", ("captions",)), fingerprint)


def _rows(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    captions: dict[Any, list[Any]] = {}
    try:
        for note in document["annotations"]:
            captions.setdefault(note["image_id"], []).append(note["caption"])
        return [
            {
                "file_name": image["file_name"],
                "image_id": image["id"],
                "captions": captions.get(image["id"], []),
                **{name: value for name, value in image.items() if name not in ("file_name", "id", "captions")},
            }
            for image in document["images"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: an image without id and file_name, or an annotation without image_id and caption ({error})"
        ) from error
