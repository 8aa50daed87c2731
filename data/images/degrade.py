"""Degraded copies of training views: blurred, or stored as JPEG of low quality, by a strength between 0 and 1."""

import io
from abc import abstractmethod
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, field_validator, model_validator

from data.images.pillow import Pixels
from data.randomness import Draws
from vlm.config import Config
from vlm.registered import by_name, names_alone, schema_by_name, written_by_name
from vlm.registry import Registry

Strength = Annotated[float, Field(ge=0, le=1)]


class Degradation(Config):
    """A way of making an image worse; its fields are its options in a recipe."""

    weight: Annotated[float, Field(ge=1e-6, le=1e6, description="How often it is chosen among the others.")] = 1.0

    @abstractmethod
    def degrade(self, view: Image.Image, strength: float) -> Image.Image:
        """The view at a strength above 0 and up to 1."""


DEGRADATIONS: Registry[type[Degradation]] = Registry("degradation", Degradation)


@DEGRADATIONS.register("blur")
class Blur(Degradation):
    """A Gaussian blur whose width grows with the strength."""

    sigma: Annotated[
        float,
        Field(gt=0, le=1, description="Standard deviation at strength 1, as a share of the view's side."),
    ] = 0.04

    def degrade(self, view: Image.Image, strength: float) -> Image.Image:  # noqa: D102
        return view.filter(ImageFilter.GaussianBlur(self.sigma * strength * view.width))


@DEGRADATIONS.register("jpeg")
class Jpeg(Degradation):
    """The view as a JPEG file shows it, whose quality falls with the strength."""

    quality: Annotated[int, Field(ge=1, le=95, description="JPEG quality at strength 1; 95 at 0.")] = 5

    def degrade(self, view: Image.Image, strength: float) -> Image.Image:  # noqa: D102
        stored = io.BytesIO()
        view.save(stored, "JPEG", quality=round(95 + (self.quality - 95) * strength))
        return Image.open(stored).convert("RGB")


Degradations = Annotated[
    dict[str, Degradation],
    BeforeValidator(by_name(DEGRADATIONS, lambda options: options or {})),
    PlainSerializer(written_by_name(DEGRADATIONS)),
    WithJsonSchema(schema_by_name(DEGRADATIONS, {"type": "null"})),
]


class DegradedConfig(Config):
    """Degraded copies of the images of some samples, as a kind of image of their own (`degraded`).

    As hard negatives for the captions (objective `hard_negative_images`), or as positives beside the images
    (`between: [degraded, text]` of any pair term). (After Wu et al., PCL-SR, 2021, who grade blurred negatives.)
    """

    by: Annotated[Degradations, Field(min_length=1, description="Ways of degrading by name, one drawn by weight.")]
    share: Annotated[float, Field(gt=0, le=1, description="Share of the visits that have a degraded copy.")] = 1.0
    strength: Annotated[
        tuple[Strength, Strength], Field(description="Least and greatest strength, drawn between; 0 changes nothing.")
    ] = (0.2, 1.0)

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        return names_alone(given, "by")

    @field_validator("strength")
    @classmethod
    def _is_a_range(cls, strength: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= strength[0] <= strength[1] <= 1:
            raise ValueError(f"found {strength}; give two numbers, 0 <= low <= high <= 1")
        return strength

    def drawn_strength(self, key: tuple[int | str, ...]) -> float | None:
        """The strength of a visit's degraded copy, keyed by (seed, epoch, sample id); None where it has none."""
        draws = Draws("degraded", *key)
        if draws.uniform() >= self.share:
            return None
        return draws.uniform(*self.strength)

    def write(self, view: Pixels, strength: float, key: tuple[int | str, ...], out: Pixels) -> None:
        """Write the degraded copy of a view into `out`, both [3, size, size]."""
        if strength == 0:
            np.copyto(out, view)
            return
        total = sum(one.weight for one in self.by.values())
        name = Draws("degradation", *key).weighted({name: one.weight / total for name, one in self.by.items()})
        image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        np.copyto(out, np.asarray(self.by[name].degrade(image, strength)).transpose(2, 0, 1))
