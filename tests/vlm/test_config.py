"""A mistake in a configuration is told in one line: path, value found, nearest valid name."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from vlm.config import Config, first_problem
from vlm.duration import Duration


class Red(Config):
    kind: Literal["red"]
    strength: float = 1.0


class Blue(Config):
    kind: Literal["blue"]
    depth: int = 1


class Part(Config):
    size: int = 1
    length: Duration = Duration(1, "steps")


class Whole(Config):
    part: Part = Part()
    maybe: Part | None = None
    parts: dict[str, Part] = Field(default={})
    rows: tuple[Part, ...] = ()
    colours: dict[str, Annotated[Red | Blue, Field(discriminator="kind")]] = Field(default={})
    either: str | tuple[str, ...] = ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prat": 1}, ["prat: unknown key (value 1)", "nearest: part"]),
        ({"part": {"sise": 2}}, ["part.sise: unknown key (value 2)", "nearest: size"]),
        ({"maybe": {"sise": 2}}, ["maybe.sise: unknown key (value 2)", "nearest: size"]),
        ({"parts": {"a": {"sise": 2}}}, ["parts.a.sise: unknown key", "nearest: size"]),
        ({"rows": [{}, {"sise": 2}]}, ["rows.1.sise: unknown key", "nearest: size"]),
        (
            {"colours": {"red": {"kind": "red", "strenght": 2}}},
            ["colours.red.strenght: unknown key", "nearest: strength"],
        ),
        ({"colours": {"x": {"kind": "bleu"}}}, ["colours.x", "bleu", "'blue'"]),
        ({"part": {"size": "big"}}, ["part.size: found 'big'"]),
        ({"part": {"length": 3}}, ["part.length", "names its unit"]),
        ({"either": 3}, ["either", "found 3"]),
    ],
)
def test_the_line_names_path_value_and_nearest_key(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(values)
    line = first_problem(caught.value, Whole)
    assert "\n" not in line
    for word in words:
        assert word in line
