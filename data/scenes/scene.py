"""Scenes: objects, groups and how they stand to each other, in units of the image's side."""

from dataclasses import dataclass
from functools import cached_property

from data.scenes.shapes import OUTLINES, place
from data.scenes.vocabulary import POSITIONS

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One shape; centre and radius are shares of the image's side, the angle is in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @cached_property
    def box(self) -> Box:
        """The tight box (x0, y0, x1, y1) around the turned outline."""
        points = place(OUTLINES[self.shape], self.x, self.y, self.radius, self.angle)
        xs, ys = zip(*points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def position(self) -> str:
        """The place, of nine, that holds the centre."""
        return POSITIONS[min(int(self.y * 3), 2)][min(int(self.x * 3), 2)]


@dataclass(frozen=True)
class Group:
    """The equal objects of a scene: one shape, one colour, one size."""

    objects: tuple[SceneObject, ...]

    @property
    def first(self) -> SceneObject:
        """The object that stands for all where only their look matters."""
        return self.objects[0]

    @property
    def kind(self) -> str:
        """Colour and shape: "red circle"."""
        return f"{self.first.colour} {self.first.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        """The mean of the objects' centres."""
        count = len(self.objects)
        return sum(o.x for o in self.objects) / count, sum(o.y for o in self.objects) / count

    @property
    def line(self) -> str | None:
        """ "row" or "column" where three or more objects stand in line, else None."""
        if len(self.objects) < 3:
            return None
        xs, ys = [o.x for o in self.objects], [o.y for o in self.objects]
        if max(ys) - min(ys) < self.first.radius:
            return "row"
        return "column" if max(xs) - min(xs) < self.first.radius else None


@dataclass(frozen=True)
class Scene:
    """One image's content; `relation` says how the first group stands to the second, where there is one."""

    groups: tuple[Group, ...]
    background: str
    relation: str | None = None

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The objects of all groups."""
        return tuple(o for group in self.groups for o in group.objects)


def stands(first: Group, relation: str, second: Group) -> bool:
    """Whether the middle of `first` lies above, below, left of or right of the middle of `second`."""
    (x0, y0), (x1, y1) = first.centre, second.centre
    return {"above": y0 < y1, "below": y0 > y1, "left of": x0 < x1, "right of": x0 > x1}[relation]
