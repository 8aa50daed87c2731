"""Pixels for a scene: soft colours, shaded shapes with a rim and a shadow, antialiased by supersampling."""

import io
from random import Random
from typing import Final

from PIL import Image, ImageDraw

from data.scenes.scene import Scene, SceneObject
from data.scenes.shapes import OUTLINES, RING_HOLE, Point, place
from data.scenes.vocabulary import BACKGROUNDS, COLOURS, RGB

SUPERSAMPLING: Final = 4
JPEG_QUALITY: Final = 92
SHADOW: Final = [round(0.22 * alpha) for alpha in range(256)]
RIM: Final = 0.11
"""Width of the darker rim, as a share of the radius."""


def render(scene: Scene, rng: Random, image_size: int = 64) -> Image.Image:
    """`scene` as an RGB image of `image_size` pixels a side; `rng` gives every surface its own tint."""
    side = image_size * SUPERSAMPLING
    canvas = _surface(BACKGROUNDS[scene.background], (side, side), 0.05, rng)
    for thing in scene.objects:
        _draw(canvas, thing, rng)
    return canvas.reduce(SUPERSAMPLING)


def encode(image: Image.Image) -> bytes:
    """The image as JPEG with full colour resolution: halved, it would smear objects of ten pixels."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _draw(canvas: Image.Image, thing: SceneObject, rng: Random) -> None:
    """Shadow, then the shaded surface with its rim, each through the shape's mask."""
    side = canvas.width
    x0, y0, x1, y1 = (edge * side for edge in thing.box)
    left, top, size = int(x0) - 1, int(y0) - 1, (int(x1 - x0) + 4, int(y1 - y0) + 4)
    x, y, radius = thing.x * side - left, thing.y * side - top, thing.radius * side
    edges = [place(OUTLINES[thing.shape], x, y, radius, thing.angle)]
    if thing.shape == "ring":
        edges.append(place(OUTLINES["ring"], x, y, radius * RING_HOLE, thing.angle))

    drop = max(2, round(radius * 0.12))
    mask = _mask(size, edges)
    canvas.paste((0, 0, 0), (left + drop // 2, top + drop), mask.point(SHADOW))
    surface = _surface(COLOURS[thing.colour], size, 0.14, rng)
    pen = ImageDraw.Draw(surface)
    for edge in edges:
        rim = max(3, round(2 * radius * RIM))
        pen.line([*edge, *edge[:2]], fill=_shade(COLOURS[thing.colour], -0.3), width=rim)
    canvas.paste(surface, (left, top), mask)


def _mask(size: tuple[int, int], edges: list[list[Point]]) -> Image.Image:
    """255 inside the first outline and outside the second, if there is one."""
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for edge, value in zip(edges, (255, 0), strict=False):
        pen.polygon(edge, fill=value)
    return mask


def _surface(colour: RGB, size: tuple[int, int], depth: float, rng: Random) -> Image.Image:
    """`colour`, slightly varied, growing darker from the top to the bottom by about twice `depth`."""
    tint = rng.uniform(-0.4, 0.4) * depth
    lean = rng.uniform(-0.4, 0.4) * depth
    corners = Image.new("RGB", (2, 2))
    for (x, y), shade in (
        ((0, 0), depth + lean),
        ((1, 0), depth - lean),
        ((0, 1), lean - depth),
        ((1, 1), -lean - depth),
    ):
        corners.putpixel((x, y), _shade(colour, shade + tint))
    return corners.resize(size, Image.Resampling.BILINEAR)


def _shade(colour: RGB, amount: float) -> RGB:
    """`colour` mixed with white (amount above 0) or black (below 0); 1 and -1 leave nothing of it."""
    goal = 255 if amount > 0 else 0
    red, green, blue = (round(channel + (goal - channel) * abs(amount)) for channel in colour)
    return red, green, blue
