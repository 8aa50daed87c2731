"""Layouts of scenes, drawn at random, without a pixel of them rendered."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from data.scenes.scene import Box, Group, Scene, SceneObject
from data.scenes.shapes import MAX_TURN, REACH, SPAN
from data.scenes.vocabulary import CLEAR_BACKGROUNDS, COLOURS, NUMBER_WORDS, RELATIONS, SHAPES, SIZES

T = TypeVar("T")

MAX_OBJECTS: Final = len(NUMBER_WORDS) - 1
EDGE: Final = 0.015
GAP: Final = 0.02
CROWD_DIAMETER: Final = 0.18
"""Largest object where six or more share an image, so that ten find room."""
LARGEST_OF_TWO: Final = 0.44
WHOLE_IMAGE: Final[Box] = (0.0, 0.0, 1.0, 1.0)


class UnfitError(Exception):
    """A layout that cannot be finished as meant from what was drawn so far; it is drawn again."""


@dataclass(frozen=True)
class Appearance:
    """The features that all objects of a group share; the diameter is a share of the image's side."""

    shape: str
    colour: str
    size: str
    diameter: float

    @property
    def reach(self) -> float:
        """The farthest that the outline reaches from its centre, however it is turned."""
        return self.diameter / 2 * REACH[self.shape]

    @property
    def margin(self) -> float:
        """The nearest to an edge that the centre may come."""
        return EDGE + self.diameter / 2 * SPAN[self.shape]

    def at(self, rng: Random, x: float, y: float) -> SceneObject:
        """An object with this look at (`x`, `y`), turned a little."""
        turn = rng.uniform(-MAX_TURN, MAX_TURN)
        return SceneObject(self.shape, self.colour, self.size, x, y, self.diameter / 2, turn)


def sample_scene(rng: Random) -> Scene:
    """A scene for training: one object, a group, two groups with a relation, or a mixture of kinds."""
    draw = rng.choices((single_scene, group_scene, relation_scene, mixed_scene), weights=(60, 14, 16, 10))[0]
    return draw(rng)


def single_scene(rng: Random, shape: str | None = None, colour: str | None = None) -> Scene:
    """One object, of the given shape and colour if any, near the middle of one of the nine places."""
    kind = (shape or rng.choice(SHAPES), colour or rng.choice(tuple(COLOURS)))
    appearance = _appearance(rng, kind, rng.choice(tuple(SIZES)))
    x, y = (_within_third(rng, rng.randrange(3), appearance.margin) for _ in range(2))
    return Scene((Group((appearance.at(rng, x, y),)),), _background(rng, [appearance]))


def group_scene(rng: Random) -> Scene:
    """Two to ten equal objects, scattered or in line."""
    count = rng.randint(2, MAX_OBJECTS)
    appearance = _appearance(rng, _kinds(rng, 1)[0], _size_for(rng, count), CROWD_DIAMETER if count > 5 else 1.0)
    in_line = count >= 3 and count * 2 * (appearance.reach + GAP) < 0.9 and rng.random() < 0.4
    group = (
        _line(rng, appearance, count) if in_line else _settle(lambda: _scatter(rng, appearance, count, WHOLE_IMAGE, []))
    )
    return Scene((group,), _background(rng, [appearance]))


def counting_scene(rng: Random, count: int) -> Scene:
    """`count` equal objects (1 to 10), scattered, whose size tells nothing about their number."""
    appearance = _appearance(rng, _kinds(rng, 1)[0], "small", CROWD_DIAMETER)
    return Scene((_settle(lambda: _scatter(rng, appearance, count, WHOLE_IMAGE, [])),), _background(rng, [appearance]))


def relation_scene(rng: Random) -> Scene:
    """Two groups of different kinds, each on its side: above, below, left of or right of each other."""
    relation = rng.choice(RELATIONS)
    counts = [rng.choices((1, 2, 3, 4), weights=(50, 23, 16, 11))[0] for _ in range(2)]
    sizes = [_size_for(rng, 2 * count - 1) for count in counts]  # half an image: objects count about twice
    if sizes == ["large", "large"]:
        sizes[rng.randrange(2)] = "medium"
    caps = [LARGEST_OF_TWO if count < 3 else CROWD_DIAMETER for count in counts]
    appearances = [_appearance(rng, *drawn) for drawn in zip(_kinds(rng, 2), sizes, caps, strict=True)]
    sides = _sides(relation, 0.5 + 0.06 * (sizes[0] == "large") - 0.06 * (sizes[1] == "large"))

    def draw() -> tuple[Group, ...]:
        groups: list[Group] = []
        for appearance, count, side in zip(appearances, counts, sides, strict=True):
            groups.append(_scatter(rng, appearance, count, side, [o for group in groups for o in group.objects]))
        if not _clearly(relation, *groups):
            raise UnfitError
        return tuple(groups)

    return Scene(_settle(draw), _background(rng, appearances), relation)


def mixed_scene(rng: Random) -> Scene:
    """Two or three groups of different kinds, one to three objects each, anywhere."""
    counts = rng.choices((1, 2, 3), weights=(60, 28, 12), k=rng.choice((2, 3, 3)))
    total = sum(counts)
    cap = CROWD_DIAMETER if total > 5 else 1.0
    appearances = [_appearance(rng, kind, _size_for(rng, max(total, 2)), cap) for kind in _kinds(rng, len(counts))]

    def draw() -> tuple[Group, ...]:
        groups: list[Group] = []
        for appearance, count in zip(appearances, counts, strict=True):
            groups.append(_scatter(rng, appearance, count, WHOLE_IMAGE, [o for group in groups for o in group.objects]))
        return tuple(groups)

    return Scene(_settle(draw), _background(rng, appearances))


def _sides(relation: str, fraction: float) -> tuple[Box, Box]:
    """The regions of the first and the second group of a relation; the first has `fraction` of the image."""
    if relation == "above":
        return (0.0, 0.0, 1.0, fraction), (0.0, fraction, 1.0, 1.0)
    if relation == "below":
        return (0.0, 1 - fraction, 1.0, 1.0), (0.0, 0.0, 1.0, 1 - fraction)
    if relation == "left of":
        return (0.0, 0.0, fraction, 1.0), (fraction, 0.0, 1.0, 1.0)
    return (1 - fraction, 0.0, 1.0, 1.0), (0.0, 0.0, 1 - fraction, 1.0)


def _kinds(rng: Random, number: int) -> list[tuple[str, str]]:
    """`number` different pairs of shape and colour."""
    return rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], number)


def _size_for(rng: Random, count: int) -> str:
    """A size word with which `count` objects find room in a whole image."""
    return rng.choice(("small", "medium", "large") if count == 1 else ("small", "medium") if count < 5 else ("small",))


def _appearance(rng: Random, kind: tuple[str, str], size: str, largest: float = 1.0) -> Appearance:
    low, high = SIZES[size]
    return Appearance(*kind, size, rng.uniform(low, min(high, largest)))


def _background(rng: Random, appearances: Iterable[Appearance]) -> str:
    """A background on which every look stands out."""
    clear = [CLEAR_BACKGROUNDS[appearance.colour] for appearance in appearances]
    return rng.choice([name for name in clear[0] if all(name in others for others in clear)])


def _within_third(rng: Random, third: int, margin: float) -> float:
    """A coordinate well inside the given third of the side, at least `margin` from both edges."""
    drawn = rng.uniform(third / 3 + 0.06, (third + 1) / 3 - 0.06)
    return min(max(drawn, margin), 1 - margin)


def _scatter(rng: Random, appearance: Appearance, count: int, region: Box, others: Sequence[SceneObject]) -> Group:
    """`count` objects inside `region`, clear of each other and of `others`; UnfitError where they find no room."""
    placed: list[SceneObject] = []
    margin = appearance.margin
    while len(placed) < count:
        for _ in range(40):
            x = rng.uniform(region[0] + margin, region[2] - margin)
            y = rng.uniform(region[1] + margin, region[3] - margin)
            if all(_apart(appearance, x, y, other) for other in (*others, *placed)):
                placed.append(appearance.at(rng, x, y))
                break
        else:
            raise UnfitError
    group = Group(tuple(placed))
    if group.line:
        raise UnfitError
    return group


def _apart(appearance: Appearance, x: float, y: float, other: SceneObject) -> bool:
    return math.hypot(x - other.x, y - other.y) > appearance.reach + other.radius * REACH[other.shape] + GAP


def _line(rng: Random, appearance: Appearance, count: int) -> Group:
    """`count` objects in a row or a column, evenly spaced."""
    margin = appearance.margin
    pitch = rng.uniform(2 * appearance.reach + GAP, (1 - 2 * margin) / (count - 1))
    start = rng.uniform(margin, 1 - margin - pitch * (count - 1))
    across = rng.uniform(margin, 1 - margin)
    row = rng.random() < 0.5
    wobble = 0.3 * appearance.diameter / 2
    places = []
    for i in range(count):
        along, off = start + pitch * i, min(max(across + rng.uniform(-wobble, wobble), margin), 1 - margin)
        places.append((along, off) if row else (off, along))
    return Group(tuple(appearance.at(rng, x, y) for x, y in places))


def _clearly(relation: str, first: Group, second: Group) -> bool:
    """Whether the groups lie farther apart along the relation's axis than across it."""
    (x0, y0), (x1, y1) = first.centre, second.centre
    along, across = abs(y0 - y1), abs(x0 - x1)
    return along > across if relation in ("above", "below") else across > along


def _settle(draw: Callable[[], T]) -> T:
    """The first draw that fits."""
    for _ in range(2000):
        try:
            return draw()
        except UnfitError:
            continue
    raise AssertionError("the sizes leave no room for the objects: see SIZES and CROWD_DIAMETER")
