"""The outlines of the shapes, as polygons about the origin that reach about one unit out; y points down."""

import math
from typing import Final

Point = tuple[float, float]
Outline = tuple[Point, ...]

MAX_TURN: Final = 0.21
"""Farthest that an object is turned, in radians: a square stays no diamond."""
RING_HOLE: Final = 0.55
"""Radius of a ring's hole, in units of its own radius."""


def _arc(centre: Point, radius: float, start: float, stop: float, num_points: int) -> list[Point]:
    """Points on a circle from angle `start` to `stop` (radians, both included)."""
    step = (stop - start) / (num_points - 1)
    angles = (start + step * i for i in range(num_points))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _circle(radius: float) -> Outline:
    return tuple(_arc((0.0, 0.0), radius, 0.0, 2 * math.pi * 39 / 40, 40))


def _star() -> Outline:
    spokes = ((1.1 if i % 2 == 0 else 0.5, math.pi * (i / 5 - 0.5)) for i in range(10))
    return tuple((r * math.cos(a), r * math.sin(a) + 0.06) for r, a in spokes)


def _heart() -> Outline:
    """The well-known curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to one unit."""
    points = []
    for t in (2 * math.pi * i / 40 for i in range(40)):
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(height + 2.5) / 15.5))
    return tuple(points)


def _cross(arm: float) -> Outline:
    corner = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
    return tuple(corner + [(-x, -y) for x, y in corner])


def _crescent(bite: float, shift: float) -> Outline:
    """The unit disc less a disc of radius `bite`, `shift` to the right; moved to the middle of its box."""
    x = (1 + shift**2 - bite**2) / (2 * shift)
    tip = math.atan2(math.sqrt(1 - x**2), x)
    inner = math.atan2(math.sqrt(1 - x**2), x - shift)
    back = _arc((0.0, 0.0), 1.0, tip, 2 * math.pi - tip, 30)
    front = _arc((shift, 0.0), bite, 2 * math.pi - inner, inner, 22)[1:-1]
    middle = (max(px for px, _ in back) - 1) / 2
    return tuple((px - middle, py) for px, py in back + front)


OUTLINES: Final[dict[str, Outline]] = {
    "circle": _circle(1.0),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)),
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(0.36),
    "ring": _circle(1.0),
    "diamond": ((0.0, -1.15), (0.75, 0.0), (0.0, 1.15), (-0.75, 0.0)),
    "crescent": _crescent(0.82, 0.52),
}
REACH: Final = {shape: max(math.hypot(x, y) for x, y in points) for shape, points in OUTLINES.items()}
"""The farthest that each shape reaches from its centre, however it is turned."""


def place(outline: Outline, x: float, y: float, radius: float, angle: float) -> list[Point]:
    """`outline` scaled by `radius`, turned by `angle` (radians) and moved to (`x`, `y`)."""
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in outline]


SPAN: Final = {
    shape: max(abs(c) for i in range(-8, 9) for p in place(points, 0.0, 0.0, 1.0, MAX_TURN * i / 8) for c in p)
    for shape, points in OUTLINES.items()
}
"""The farthest that each shape reaches along an axis, turned by at most MAX_TURN."""
