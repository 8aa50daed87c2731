"""How a recipe chooses each tower: kinds by name, each a configuration that builds its tower; others by their class."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import nn

from vlm.config import Config, located_problem
from vlm.errors import nearest
from vlm.model.foreign import ForeignFiles
from vlm.model.language_model_config import LanguageModelConfig
from vlm.model.tokenizer import Tokenizer
from vlm.model.towers import TextTower
from vlm.model.transformers_models import TransformersModels
from vlm.paths import LocalPath
from vlm.registry import Registry

Kind = TypeVar("Kind", bound="TowerConfig")


@dataclass(frozen=True)
class TowerContext:
    """The surroundings of a tower that is built: width of the embedding, side of images, files of other libraries.

    `split` is how a text tower leaves its last layers to a decoder; None: it keeps all.
    """

    embed_dim: int
    image_size: int
    quick_gelu: bool
    files: ForeignFiles
    models: TransformersModels
    split: LanguageModelConfig | None = None


class TowerConfig(Config, ABC):
    """One kind of tower; its fields are its options in a recipe."""

    weights: LocalPath | None = Field(
        default=None,
        description="of this tower alone: a safetensors or torch file of plain tensors, or a folder with one",
    )

    @property
    def title(self) -> str:
        """The tower in lines and errors."""
        return _key_of(self)

    @property
    def weights_file(self) -> str | None:
        """Where tensors lie that are read by name when the tower is built; None where `build` has read all."""
        return self.weights

    def without_weights(self: Kind) -> Kind:
        """The configuration that builds the same tower and reads no weights for it."""
        return self.model_copy(update={"weights": None})


class ImageTowerConfig(TowerConfig):
    """One kind of image tower, under `towers.image` of a recipe."""

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> "ImageTowerConfig":  # noqa: ARG002
        """The same tower with all written out that names and folders decide, of this kind or of a simpler one."""
        return self

    def images(self, files: ForeignFiles) -> Mapping[str, Any]:  # noqa: ARG002
        """The images that the tower was made for, as fields of `ImageSpec`; what is left out has its default."""
        return {}

    @abstractmethod
    def build(self, context: TowerContext) -> nn.Module:
        """The network that makes of normalised pixels [batch, 3, size, size] embeddings [batch, embed_dim].

        What it projects to the embedding with is its attribute `projection`, which a lock leaves free; a method
        `blocks` may name the blocks that it repeats.
        """


class TextTowerConfig(TowerConfig):
    """One kind of text tower, under `towers.text` of a recipe."""

    def resolved(self, embed_dim: int, files: ForeignFiles) -> "TextTowerConfig":  # noqa: ARG002
        """The same tower with all written out that names and folders decide, of this kind or of a simpler one."""
        return self

    def tokenizer_fields(self) -> Mapping[str, Any]:
        """The tokenizer, by the fields of open_clip's `text_cfg`; by default CLIP's, at 77 tokens."""
        return {}

    @property
    def brings_vocabulary(self) -> bool:
        """Whether the tower was trained elsewhere, on a tokenizer of its own."""
        return False

    @abstractmethod
    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        """The tower for the ids that `tokenizer` makes; it embeds them by an `nn.Embedding`."""


IMAGE_TOWERS: Registry[type[ImageTowerConfig]] = Registry("image tower", ImageTowerConfig)
TEXT_TOWERS: Registry[type[TextTowerConfig]] = Registry("text tower", TextTowerConfig)


def tower_reader(registry: Registry[Any]) -> Callable[[Any], Any]:
    """How a recipe's mapping becomes the configuration of a tower of one of the registered kinds, or of one's own."""

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {str(name): option for name, option in value.items() if option is not None}
        known = dict(sorted(registry.all().items()))
        chosen = [name for name in given if name in known or ":" in name]
        if len(chosen) != 1:
            _refuse_unknown(given, known)
            names = " and ".join(chosen) or "none of them"
            raise ValueError(f"exactly one of {', '.join(known)} is needed, or package.module:Class; found {names}")
        kind = registry.find(chosen[0])
        if chosen[0] in kind.model_fields:
            return _validated(kind, given, ())
        options = given.pop(chosen[0])
        if given:
            raise _refusal((next(iter(given)),), f"an option of {chosen[0]} is written within it")
        return _validated(kind, options, (chosen[0],))

    return read


def _validated(kind: type[TowerConfig], values: Any, place: tuple[str, ...]) -> TowerConfig:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        path, words = located_problem(error, kind)
        raise _refusal((*place, *path), words) from None


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, type[TowerConfig]]) -> None:
    """Raise for a key of no kind: it explains more than that no kind is chosen."""
    options = {option for kind in known.values() for option in kind.model_fields}
    unknown = next((name for name in given if name not in options and ":" not in name), None)
    if unknown is not None:
        raise _refusal((unknown,), f"unknown key (value {given[unknown]!r:.60}); {nearest(unknown, known)}")


def _refusal(place: tuple[str, ...], words: str) -> ValidationError:
    problem = PydanticCustomError("value_error", "{words}", {"words": words})
    return ValidationError.from_exception_data("tower", [InitErrorDetails(type=problem, loc=place, input=None)])


def _key_of(tower: TowerConfig) -> str:
    """The name of its kind in a recipe."""
    registry: Registry[Any] = IMAGE_TOWERS if isinstance(tower, ImageTowerConfig) else TEXT_TOWERS
    class_name = f"{type(tower).__module__}:{type(tower).__qualname__}"
    return next((name for name, kind in registry.all().items() if kind is type(tower)), class_name)


def write_tower(tower: TowerConfig) -> dict[str, Any]:
    """The mapping from which `tower_reader` makes the same configuration."""
    key = _key_of(tower)
    fields = {name: value for name, value in tower.model_dump(mode="json").items() if value is not None}
    return fields if key in fields else {key: fields}


def tower_schema(registry: Registry[Any]) -> dict[str, Any]:
    """The JSON schema of a tower: one mapping with the keys of all kinds; a key of several may mean any of theirs."""
    options: dict[str, list[dict[str, Any]]] = {}
    for name, kind in sorted(registry.all().items()):
        fields = kind.model_json_schema()["properties"]
        for option, meaning in (fields if name in fields else {name: {"type": "object"}}).items():
            if meaning not in (meanings := options.setdefault(option, [])):
                meanings.append(meaning)
    properties = {
        name: meanings[0] if len(meanings) == 1 else {"anyOf": meanings} for name, meanings in options.items()
    }
    return {"type": "object", "properties": properties, "patternProperties": {":": {}}, "additionalProperties": False}
