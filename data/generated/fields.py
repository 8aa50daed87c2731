"""The json member of a sample that gets a generated caption, and beside it where the caption is from."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from data.samples.bad_sample import BadSampleError
from data.samples.captions import TXT, USUAL_FIELDS, listed
from data.shards.tar import MOST_BYTES
from vlm.errors import UserError
from vlm.paths import shown

FIELD: Final = "generated_captions"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class GeneratedCaption:
    """A caption by a model, its log-likelihood there with that of its end, its tokens without marks, and its cosine.

    The cosine is that of image and caption by the same model's towers: its CLIPScore by itself, without the factor.
    """

    text: str
    log_likelihood: float
    num_tokens: int
    cosine: float


@dataclass(frozen=True)
class Origin:
    """Where captions are from: the identity of a model's weights, and the options of generation."""

    model: str
    options: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What provenance begins with."""
        return {"model": self.model, **self.options}


@dataclass(frozen=True)
class CaptionField:
    """The json field that generated captions go to, a list, and the field of their provenance, a list as long.

    Training reads `captions` and `caption` by itself, before or behind a txt member: generated ones may be among them
    only where that is said.

    Raises:
        UserError: no such field can be.
    """

    name: str = FIELD
    among_captions: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no name of a field, or one that would change what is trained on in silence."""
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--field: found {shown(self.name)}; a field is called by at most 100 of A-Z, a-z, 0-9, '_', '.' and "
                f"'-', a letter first, as {FIELD}"
            )
        if self.name == TXT:
            raise UserError(f"--field: {TXT} is a member of its own, not a field of the json; {FIELD} is one")
        if self.name in USUAL_FIELDS and not self.among_captions:
            raise UserError(
                f"--field: {self.name} is where captions are looked for by themselves, so that generated ones would be "
                f"trained on in place of others or among them; name another, such as {FIELD}, or say --among-captions"
            )
        if self.among_captions and self.name not in USUAL_FIELDS:
            raise UserError(f"--among-captions: means nothing with --field {self.name}, which no caption stands in")

    @property
    def provenance(self) -> str:
        """The field with an object for each of the captions; null for one that no captioner wrote."""
        return f"{self.name}_provenance"

    def there(self, fields: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """The captions and provenances that a sample's fields have, equally many.

        Raises:
            BadSampleError: under these names stands something else, which is not to be changed.
        """
        stored, origins = fields.get(self.name), fields.get(self.provenance, [])
        captions = stored if isinstance(stored, list) else [] if stored is None else [stored]
        listed(captions)
        if not isinstance(origins, list) or len(origins) > len(captions):
            raise BadSampleError(f"its json has a field {self.provenance} that is not as long as {self.name}")
        missing = len(captions) - len(origins)
        if missing and not self.among_captions:
            raise BadSampleError(f"its json has a field {self.name} already, without {self.provenance}")
        return captions, [*origins, *[None] * missing]

    def added(self, fields: Mapping[str, Any], caption: GeneratedCaption, origin: Origin) -> bytes:
        """The json member with one caption more; all other fields stay.

        Raises:
            BadSampleError: as `there`, or it would be longer than is read.
        """
        captions, origins = self.there(fields)
        measures = {"log_likelihood": caption.log_likelihood, "num_tokens": caption.num_tokens}
        made = {**origin.to_json(), **measures, "cosine": caption.cosine}
        added = {self.name: [*captions, caption.text], self.provenance: [*origins, made]}
        stored = json.dumps({**fields, **added}).encode()
        if len(stored) > MOST_BYTES["json"]:
            raise BadSampleError(f"its json would have {len(stored):,} bytes; at most {MOST_BYTES['json']:,} are read")
        return stored

    def found(self, fields: Mapping[str, Any], origin: Origin) -> GeneratedCaption | None:
        """The last caption in a sample's fields that is from there."""
        try:
            captions, origins = self.there(fields)
        except BadSampleError:
            return None
        wanted = origin.to_json()
        for text, made in reversed(list(zip(captions, origins, strict=True))):
            if isinstance(made, dict) and all(made.get(name) == value for name, value in wanted.items()):
                measures = {name: made.get(name) for name in ("log_likelihood", "num_tokens", "cosine")}
                with suppress(ValidationError):  # somebody changed it
                    return _CAPTION.validate_python({"text": text, **measures})
        return None


_CAPTION = TypeAdapter(GeneratedCaption)
