"""The words that scenes are made of, and the colours behind them."""

import math
from typing import Final

RGB = tuple[int, int, int]

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "crescent")
COLOURS: Final[dict[str, RGB]] = {
    "red": (214, 58, 60),
    "yellow": (245, 204, 60),
    "green": (70, 158, 78),
    "cyan": (44, 188, 206),
    "blue": (56, 100, 210),
    "purple": (150, 66, 172),
    "pink": (246, 146, 192),
    "brown": (128, 84, 52),
}
BACKGROUNDS: Final[dict[str, RGB]] = {
    "white": (248, 248, 246),
    "grey": (160, 164, 172),
    "beige": (238, 212, 166),
    "mint": (174, 228, 198),
    "navy": (34, 40, 86),
    "black": (30, 30, 34),
}
SIZES: Final[dict[str, tuple[float, float]]] = {"small": (0.165, 0.21), "medium": (0.24, 0.30), "large": (0.40, 0.52)}
"""Smallest and largest diameter for a size word, as a share of the image's side."""

NUMBER_WORDS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS: Final = ("above", "below", "left of", "right of")
OPPOSITE: Final = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
POSITIONS: Final = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""The nine places of an image, by row and column of a three by three grid."""

MIN_CONTRAST: Final = 45.0


def class_names() -> list[str]:
    """Every kind of object ("red circle"), in the order of the class labels."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def plural(shape: str) -> str:
    """The shape's name for more than one."""
    return shape + ("es" if shape.endswith("s") else "s")


def contrast(first: RGB, second: RGB) -> float:
    """The visible difference of two sRGB colours: the CIE 1976 difference in L*a*b* under D65."""
    return math.dist(_lab(first), _lab(second))


def _lab(colour: RGB) -> tuple[float, float, float]:
    red, green, blue = (_linear(channel / 255) for channel in colour)
    x = _compress((0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047)
    y = _compress(0.2126729 * red + 0.7151522 * green + 0.0721750 * blue)
    z = _compress((0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


def _compress(value: float) -> float:
    return math.cbrt(value) if value > 216 / 24389 else (24389 / 27 * value + 16) / 116


CLEAR_BACKGROUNDS: Final = {
    colour: tuple(name for name, back in BACKGROUNDS.items() if contrast(rgb, back) >= MIN_CONTRAST)
    for colour, rgb in COLOURS.items()
}
"""For each colour, the backgrounds on which it stands out."""
