"""Alarms: a figure that moves too far within a stretch of training warns, or ends the run and keeps a good state."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.duration import Duration, PositiveDuration
from vlm.errors import EveryRankError, nearest


class Movement(Config):
    """A figure of metrics.jsonl by name, and how far it may not fall from its highest or rise from its lowest."""

    metric: str = Field(description="as in metrics.jsonl: eval/NAME/FIGURE, geometry/FIGURE, loss, a term's name")
    falls_by: float | None = Field(default=None, gt=0, le=1e12, description="in the figure's own unit")
    rises_by: float | None = Field(default=None, gt=0, le=1e12, description="in the figure's own unit")

    @model_validator(mode="after")
    def _one_way(self) -> "Movement":
        if (self.falls_by is None) == (self.rises_by is None):
            raise ValueError("an alarm needs one of falls_by and rises_by")
        return self

    def start(self, values: Sequence[float]) -> int:
        """Where among `values` the movement to the last of them began: the last place of the best."""
        best = max(values) if self.rises_by is None else min(values)
        return len(values) - 1 - values[::-1].index(best)

    def happened(self, values: Sequence[float]) -> bool:
        """Whether the last of `values` is that far from the best of them."""
        if not values:
            return False
        moved = abs(values[-1] - values[self.start(values)])
        limit = self.falls_by if self.rises_by is None else self.rises_by
        assert limit is not None
        return moved >= limit

    def words(self, values: Sequence[float]) -> str:
        """The movement in words."""
        verb = "fell" if self.rises_by is None else "rose"
        return f"{self.metric} {verb} from {values[self.start(values)]:.4g} to {values[-1]:.4g}"


class AlarmConfig(Movement):
    """When to warn, or to stop: the figure moved so far within `over`, and so did `along_with` where it is given."""

    over: PositiveDuration = Field(description="the stretch of training that is looked back on")
    along_with: Movement | None = Field(default=None, description="a second figure that has to move in that stretch")
    action: Literal["warn", "stop"] = Field(
        default="warn", description="stop: end the run, and keep the newest checkpoint of before the movement"
    )


def kind_of(name: str) -> str:
    """The kind of a line, by the figures it brings: eval/NAME, geometry, or nothing for those of a step."""
    return name.rpartition("/")[0]


def require_known(alarms: Sequence[AlarmConfig], figures: Mapping[str, Collection[str]]) -> None:
    """Raise EveryRankError for an alarm on what a run never measures; `figures` are those of each kind of line."""
    for place, alarm in enumerate(alarms):
        for movement in filter(None, (alarm, alarm.along_with)):
            kind = kind_of(movement.metric)
            if kind not in figures:
                choices = nearest(kind, (one for one in figures if one))
                raise EveryRankError(f"alarm.{place}: nothing in this run measures {movement.metric}; {choices}")
            if movement.metric not in figures[kind]:
                choices = nearest(movement.metric, figures[kind])
                raise EveryRankError(f"alarm.{place}: there is no figure {movement.metric!r}; {choices}")


@dataclass(frozen=True)
class Alarm:
    """An alarm that went off: what happened, since when, and what is to be done."""

    message: str
    since: int
    stops: bool


@dataclass
class _Watch:
    config: AlarmConfig
    num_steps: int
    points: dict[str, deque[tuple[int, float]]] = field(default_factory=dict)
    is_on: bool = False

    @property
    def movements(self) -> list[Movement]:
        return [self.config] if self.config.along_with is None else [self.config, self.config.along_with]

    def values(self, metric: str) -> list[float]:
        return [value for _, value in self.points.get(metric, ())]

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Take what is watched of a line; whether there was any."""
        is_watched = False
        for metric in {movement.metric for movement in self.movements}:
            if isinstance(metrics.get(metric), int | float):
                self.points.setdefault(metric, deque()).append((step, metrics[metric]))
                is_watched = True
        for points in self.points.values():
            while points and points[0][0] < step - self.num_steps:
                points.popleft()
        return is_watched

    def since(self) -> int:
        """The step at which the figure was at its best."""
        points = self.points[self.config.metric]
        return points[self.config.start(self.values(self.config.metric))][0]


class Alarms:
    """Watches the lines of metrics as they are written. A movement goes off once, and again after it was undone."""

    def __init__(self, configs: Sequence[AlarmConfig], steps: Callable[[Duration], int]) -> None:
        self._watches = [_Watch(config, steps(config.over)) for config in configs]

    def __len__(self) -> int:
        return len(self._watches)

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Go on after lines that an earlier life of the run has written."""
        for line in lines:
            self.observe(line["step"], line)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that go off with a line."""
        raised = []
        for watch in self._watches:
            if not watch.add(step, metrics):
                continue
            was_on = watch.is_on
            watch.is_on = all(one.happened(watch.values(one.metric)) for one in watch.movements)
            if watch.is_on and not was_on:
                what = " while ".join(one.words(watch.values(one.metric)) for one in watch.movements)
                message = f"alarm: {what}, within {watch.config.over}"
                raised.append(Alarm(message, watch.since(), watch.config.action == "stop"))
        return raised

    def good_steps(self) -> list[int]:
        """Steps to which a run that has to stop may want to go back: the best of each figure that can stop it."""
        stopping = [watch for watch in self._watches if watch.config.action == "stop"]
        return [watch.since() for watch in stopping if watch.points.get(watch.config.metric)]
