"""A sample of the counting set: its captions are those that name its number, which stands in its json."""

import json
from collections.abc import Mapping, Sequence
from tarfile import TarFile
from typing import Any, Final

from data.check.samples import StoredSample
from data.counting.named import NamedNumber
from data.samples.bad_sample import BadSampleError
from data.samples.captions import listed
from data.shards.tar import MOST_BYTES
from data.shards.tar_writing import add_member

NUMBER: Final = "number"
_CAPTIONS, _CAPTION, _TXT = "captions", "caption", "txt"


def counting_json(fields: Mapping[str, Any], captions: Sequence[str], named: NamedNumber) -> bytes:
    """The json member: its `captions` name the number, which is its `number`; all other fields stay.

    Where the captions were read from `caption`, that keeps the same ones.

    Raises:
        BadSampleError: it would be longer than is read.
    """
    kept = [captions[place] for place in named.places]
    changed = {**fields, _CAPTIONS: kept, NUMBER: named.value}
    if len(kept) < len(captions) and _CAPTION in fields and not _texts(fields.get(_CAPTIONS)):
        changed[_CAPTION] = kept
    stored = json.dumps(changed).encode()
    if len(stored) > MOST_BYTES["json"]:
        raise BadSampleError(f"its json would have {len(stored):,} bytes; at most {MOST_BYTES['json']:,} are read")
    return stored


def add_counted(tar: TarFile, sample: StoredSample, named: NamedNumber) -> None:
    """Add a sample: its members bit by bit, but for the json, and for a txt that does not name the number."""
    fields = sample.fields()
    captions = sample.captions(fields)
    new_json = counting_json(fields, captions, named)
    kept = [captions[place] for place in named.places]
    for suffix in sample.members:
        stored = new_json if suffix == "json" else sample.read(suffix)
        if suffix == _TXT and stored.decode("utf-8", "replace").strip() not in kept:
            stored = kept[0].encode()
        add_member(tar, sample.key, suffix, stored)
    if "json" not in sample.members:
        add_member(tar, sample.key, "json", new_json)


def _texts(stored: Any) -> list[str]:
    return [text for text in listed(stored) if text.strip()]
