"""The captions of a sample, as its shard stores them, and the policy by which a training step reads them."""

import codecs
from bisect import bisect
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from data.randomness import Draws
from data.samples.bad_sample import BadSampleError
from data.samples.cleaning import CleaningStep, cleaned
from data.stored_json import parse_json
from vlm.config import Config

TXT = "txt"
USUAL_FIELDS = ("captions", TXT, "caption")
MOST_CHARACTERS = 10_000
"""So much is read of a caption: more than any text tower sees, and little enough to be cleaned at each visit."""
MOST_CAPTIONS = 10_000
"""So many captions of a field are read."""
_MOST_TOGETHER = 100_000  # characters of all captions that one visit takes
DROPPED = "(dropped)"
_SENTENCE_ENDS = (".", "!", "?", "…", "。")

CaptionPolicy = Literal["first", "random", "all", "concat"]
TxtLayout = Literal["whole", "lines"]
CaptionsByField = dict[str, tuple[str, ...]]


class CaptionConfig(Config):
    """The policy by which a training step reads a sample's captions; a policy alone may stand for it: `caption: first`.

    `first` and `random` take one caption, `concat` joins them in their stored order, and `all` takes one at random and
    gives the others along as further positives. Of several `fields`, one is drawn by weight among those that the sample
    has, and the policy applies within it; only `all` gives the captions of every field.
    """

    policy: Annotated[CaptionPolicy, Field(description="Which captions a step reads.")] = "random"
    fields: Annotated[
        dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] | None,
        Field(
            min_length=1,
            description="Weights by json field, or `txt`; by default json `captions`, else txt, else json `caption`.",
        ),
    ] = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of visits whose caption is the empty text.")] = 0.0
    txt: Annotated[TxtLayout, Field(description="A txt member is one caption (whole), or one a line (lines).")] = (
        "whole"
    )
    clean: Annotated[tuple[CleaningStep, ...], Field(description="Cleaning steps, applied in this order.")] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """The fields in which captions are looked for: json fields, or `txt` for the txt member."""
        return USUAL_FIELDS if self.fields is None else tuple(self.fields)

    @model_validator(mode="before")
    @classmethod
    def _policy_alone(cls, given: Any) -> Any:
        return {"policy": given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A mapping, or a policy alone."""
        mapping = handler(schema)
        policy = handler.resolve_ref_schema(mapping)["properties"]["policy"]
        return {"anyOf": [{"type": policy["type"], "enum": policy["enum"]}, mapping]}


class ChosenCaptions(NamedTuple):
    """The captions that one visit of a sample reads: `text`, and the `field` it is from (`DROPPED` for the empty text).

    `all` holds the distinct positives, `text` first, under the policy `all`; else nothing.
    """

    text: str
    field: str
    all: tuple[str, ...] = ()


def read_fields(stored: bytes | None) -> dict[str, Any]:
    """The fields of a sample's json member; none when it has no such member.

    Raises:
        BadSampleError: the member is no JSON object.
    """
    if stored is None:
        return {}
    try:
        fields = parse_json(stored)
    except ValueError as error:
        raise BadSampleError(f"its json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise BadSampleError(f"its json holds no object but a {type(fields).__name__}")
    return fields


def captions_by_field(text: bytes | None, fields: Mapping[str, Any], config: CaptionConfig) -> CaptionsByField:
    """The captions of a sample from its txt member and its json fields, cleaned, stripped, without empty ones.

    Holds each of the fields that `config` names and the sample has, in the order of `config`; without such names the
    first of the usual places that has a caption.

    Raises:
        BadSampleError: the txt is not UTF-8, or a caption is no text; only where `config` looks for captions.
    """
    by_field: CaptionsByField = {}
    for name in config.places:
        stored = _decoded(text, config.txt) if name == TXT else listed(fields.get(name))
        captions = tuple(caption for caption in (cleaned(caption, config.clean) for caption in stored) if caption)
        if captions:
            by_field[name] = captions
            if config.fields is None:
                break
    return by_field


def read_captions(text: bytes | None, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a sample at the usual place, stripped, without empty ones.

    Raises:
        BadSampleError: the txt is not UTF-8, or a caption is no text.
    """
    return tuple(caption for texts in captions_by_field(text, fields, CaptionConfig()).values() for caption in texts)


def choose(captions: CaptionsByField, config: CaptionConfig, draws: Draws) -> ChosenCaptions:
    """The captions that one visit reads of a sample's.

    Takes three numbers of `draws` whatever `config` says (dropout, field, caption), so that one option does not change
    what another one draws.

    Raises:
        BadSampleError: there is no caption.
    """
    if not captions:
        raise BadSampleError("it has no caption, or only empty ones")
    dropped, place, which = draws.uniform() < config.dropout, draws.uniform(), draws.uniform()
    if dropped:
        return ChosenCaptions("", DROPPED, ("",) if config.policy == "all" else ())
    field = _at(tuple(captions), place, config.fields)
    texts = captions[field]
    if config.policy == "concat":
        return ChosenCaptions(_joined(texts), field)
    text = texts[0] if config.policy == "first" else _at(texts, which)
    positives = (text, *(other for texts in captions.values() for other in texts)) if config.policy == "all" else ()
    return ChosenCaptions(text, field, _as_many_as_fit(dict.fromkeys(positives)))


def readable(text: str) -> str:
    """The part of a text that is read: its first `MOST_CHARACTERS`, with U+FFFD for halves of surrogate pairs."""
    text = text[:MOST_CHARACTERS]
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def listed(stored: Any) -> list[str]:
    """The texts of a json field: itself, or what it lists; null and NaN are nothing.

    Raises:
        BadSampleError: one is no text.
    """
    captions = []
    for caption in stored if isinstance(stored, list | tuple) else [stored]:
        if isinstance(caption, str):
            captions.append(readable(caption))
        elif not (caption is None or caption != caption):  # NaN is what tables have for null
            raise BadSampleError(f"a caption is no text but {caption!r:.40}")
        if len(captions) == MOST_CAPTIONS:
            break
    return captions


def _decoded(text: bytes | None, layout: TxtLayout) -> list[str]:
    if text is None:
        return []
    most = 4 * (MOST_CHARACTERS if layout == "whole" else _MOST_TOGETHER)
    start = text.removeprefix(codecs.BOM_UTF8)[:most]
    decoder = codecs.getincrementaldecoder("utf-8")()  # which may end within a character
    try:
        decoded = decoder.decode(start, final=len(start) < most)
        return [readable(caption) for caption in (decoded.split("\n") if layout == "lines" else [decoded])]
    except UnicodeDecodeError as error:
        raise BadSampleError(f"its caption is not UTF-8 (byte {error.start})") from error


def _at(choices: tuple[str, ...], place: float, weights: Mapping[str, float] | None = None) -> str:
    """The choice at `place` in [0, 1), each taking room by its weight."""
    ends = list(accumulate(1.0 if weights is None else weights[choice] for choice in choices))
    return choices[min(bisect(ends, place * ends[-1]), len(choices) - 1)]


def _as_many_as_fit(texts: Iterable[str]) -> tuple[str, ...]:
    """The first texts, of `_MOST_TOGETHER` characters together at most."""
    texts = tuple(texts)
    return texts[: bisect(list(accumulate(map(len, texts))), _MOST_TOGETHER)]


def _joined(captions: tuple[str, ...]) -> str:
    """One text of all captions: each but the last ends as a sentence, so that neighbours do not run together."""
    *before, last = captions
    joined = " ".join([*(text if text.endswith(_SENTENCE_ENDS) else f"{text}." for text in before), last])
    return joined[:MOST_CHARACTERS]
