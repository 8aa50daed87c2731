"""The captions of a sample, as its shard stores them, and the one that a training step reads."""

import json
from collections.abc import Mapping
from typing import Any

from data.bad_sample import BadSampleError
from data.config import Captioning
from data.randomness import Draws

CAPTION_SUFFIXES = ("txt", "json")


def read_fields(stored: bytes | None) -> dict[str, Any]:
    """The fields of a sample's json member; none when it has no such member.

    Raises:
        BadSampleError: the member is no JSON object.
    """
    if stored is None:
        return {}
    try:
        fields = json.loads(stored)
    except ValueError as error:
        raise BadSampleError(f"its json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise BadSampleError(f"its json holds no object but a {type(fields).__name__}")
    return fields


def read_captions(text: bytes | None, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a sample, stripped, without empty ones: json `captions`, else its txt, else json `caption`.

    Raises:
        BadSampleError: the txt is not UTF-8, or a caption is no text.
    """
    if (several := fields.get("captions")) is not None:
        stored = several if isinstance(several, list) else [several]
    elif text is not None:
        try:
            stored = [text.decode("utf-8")]
        except UnicodeDecodeError as error:
            raise BadSampleError(f"its caption is not UTF-8 (byte {error.start})") from error
    else:
        stored = [fields.get("caption") or ""]
    wrong = next((caption for caption in stored if not isinstance(caption, str)), None)
    if wrong is not None:
        raise BadSampleError(f"a caption is no text but {wrong!r:.40}")
    return tuple(caption for caption in map(str.strip, stored) if caption)


def choose_caption(captions: tuple[str, ...], policy: Captioning, draws: Draws) -> str:
    """The caption for one visit of a sample.

    Raises:
        BadSampleError: there is none.
    """
    if not captions:
        raise BadSampleError("it has no caption, or only empty ones")
    return captions[0] if policy == "first" else captions[draws.integer(len(captions))]
