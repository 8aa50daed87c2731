"""The kind of tower that is several, of models that were trained one after another or apart, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from torch import nn

from vlm.config import Config
from vlm.errors import UserError
from vlm.model.foreign import ForeignFiles
from vlm.model.heads import HeadConfig, build_head
from vlm.model.joined import JoinedTextTower, JoinedTrunk, Member
from vlm.model.tokenizer import Tokenizer
from vlm.model.tower_config import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    ImageTowerConfig,
    Kind,
    TextTowerConfig,
    TowerConfig,
    TowerContext,
    tower_reader,
    write_tower,
)
from vlm.model.towers import TextTower
from vlm.model.transformers_models import TransformersModels

# Schemas without references: that of a joined tower stands within that of all kinds of tower.
_MAPPING = WithJsonSchema({"type": "object"})
_MAPPINGS = WithJsonSchema({"type": "array", "items": {"type": "object"}, "minItems": 1})


def _not_joined(value: Any) -> Any:
    """Raise ValueError for several towers in the place of one, before they are read: such could go down for ever."""
    is_joined = "joined" in value if isinstance(value, dict) else getattr(value, "members", None) is not None
    if is_joined:
        raise ValueError("a joined tower is no member of another: its members are named beside the others")
    return value


AnyImageTower = Annotated[
    ImageTowerConfig,
    BeforeValidator(tower_reader(IMAGE_TOWERS)),
    BeforeValidator(_not_joined),  # goes first
    PlainSerializer(write_tower),
    _MAPPING,
]
AnyTextTower = Annotated[
    TextTowerConfig,
    BeforeValidator(tower_reader(TEXT_TOWERS)),
    BeforeValidator(_not_joined),
    PlainSerializer(write_tower),
    _MAPPING,
]


class _MemberConfig(Config):
    embed_dim: int = Field(gt=0, le=65536, description="width of what the tower makes, before any head")
    head: HeadConfig | None = Field(default=None, description="the head that it was trained with")
    quick_gelu: bool = Field(default=False, description="OpenAI's approximation of GELU in this model")

    @property
    def width(self) -> int:
        """The width of its part of the embedding."""
        return self.embed_dim if self.head is None else self.head.embed_dim(self.embed_dim)

    def member(self, network: nn.Module) -> Member:
        """The network with its head."""
        return Member(network, nn.Identity() if self.head is None else build_head(self.head, self.embed_dim))

    def context(self, context: TowerContext) -> TowerContext:
        """The surroundings of its tower, which shares no weights with others."""
        return replace(
            context, embed_dim=self.embed_dim, quick_gelu=self.quick_gelu, models=TransformersModels(), split=None
        )


class ImageMemberConfig(_MemberConfig):
    """One of several image towers."""

    tower: AnyImageTower


class TextMemberConfig(_MemberConfig):
    """One of several text towers."""

    tower: AnyTextTower


@IMAGE_TOWERS.register("joined")
class JoinedImageConfig(ImageTowerConfig):
    """Image towers side by side: `vlm join` writes it of models of one image specification (MCL: Zhang et al., 2024).

    The embedding is their unit vectors one after another, divided by the root of their number.
    """

    members: Annotated[tuple[ImageMemberConfig, ...], _MAPPINGS] = Field(min_length=1)

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> "JoinedImageConfig":
        """Each tower written out. Raises UserError where the widths do not make the embedding's."""
        _require_width(self.members, embed_dim, "image")
        towers = [one.tower.resolved(one.embed_dim, image_size, files) for one in self.members]
        return self.model_copy(update={"members": _with_towers(self.members, towers)})

    def without_weights(self: Kind) -> Kind:
        """The same towers, for none of which weights are read."""
        return _unread(self)

    def images(self, files: ForeignFiles) -> Mapping[str, Any]:
        """The images of the first."""
        return self.members[0].tower.images(files)

    def build(self, context: TowerContext) -> nn.Module:
        """The networks. Raises UserError as theirs do."""
        return JoinedTrunk([one.member(one.tower.build(one.context(context))) for one in self.members])


@TEXT_TOWERS.register("joined")
class JoinedTextConfig(TextTowerConfig):
    """Text towers of one tokenizer side by side, as the image towers are."""

    members: Annotated[tuple[TextMemberConfig, ...], _MAPPINGS] = Field(min_length=1)

    def resolved(self, embed_dim: int, files: ForeignFiles) -> "JoinedTextConfig":
        """Each tower written out. Raises UserError where the widths do not make the embedding's."""
        _require_width(self.members, embed_dim, "text")
        towers = [one.tower.resolved(one.embed_dim, files) for one in self.members]
        return self.model_copy(update={"members": _with_towers(self.members, towers)})

    def without_weights(self: Kind) -> Kind:
        """The same towers, for none of which weights are read."""
        return _unread(self)

    def tokenizer_fields(self) -> Mapping[str, Any]:
        """The tokenizer of the first, which is that of all."""
        return self.members[0].tower.tokenizer_fields()

    @property
    def brings_vocabulary(self) -> bool:
        """Whether any of them was trained elsewhere."""
        return any(one.tower.brings_vocabulary for one in self.members)

    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        """The towers. Raises UserError as theirs do."""
        towers = [one.tower.build(one.context(context), tokenizer) for one in self.members]
        members = [one.member(tower) for one, tower in zip(self.members, towers, strict=True)]
        return JoinedTextTower(members, towers)


def _require_width(members: Sequence[_MemberConfig], embed_dim: int, name: str) -> None:
    try:
        widths = [one.width for one in members]
    except ValueError as error:
        raise UserError(f"towers.{name}.joined: {error}") from None
    if sum(widths) != embed_dim:
        words = " + ".join(map(str, widths))
        raise UserError(f"towers.{name}.joined: its members make {words} dimensions, the embedding has {embed_dim}")


def _with_towers(members: Sequence[_MemberConfig], towers: Sequence[TowerConfig]) -> tuple[_MemberConfig, ...]:
    return tuple(one.model_copy(update={"tower": tower}) for one, tower in zip(members, towers, strict=True))


def _unread(joined: Kind) -> Kind:
    members = getattr(joined, "members")  # noqa: B009 - either kind has them
    towers = [one.tower.without_weights() for one in members]
    return joined.model_copy(update={"weights": None, "members": _with_towers(members, towers)})
