"""Fields of a dataclass are options of a command: their names, bounds, defaults, and which are required."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from launch.options import grouped


@dataclass(frozen=True)
class Box:
    out: Annotated[Path, typer.Option(help="Where to.")]
    width: Annotated[int, typer.Option(min=1, max=9)] = 3
    closed: Annotated[bool, typer.Option("--closed")] = False


@grouped
def pack(things: Annotated[list[str], typer.Argument()], box: Box, label: str = "none") -> None:
    """Pack things."""
    typer.echo(f"{things} {box} {label}")


@pytest.mark.parametrize(
    ("words", "box", "label"),
    [
        (["a", "b", "--out", "x"], Box(Path("x")), "none"),
        (["a", "b", "--out", "x", "--width", "9", "--closed", "--label", "red"], Box(Path("x"), 9, True), "red"),
    ],
)
def test_fields_are_options_among_the_others_of_a_command(words: list[str], box: Box, label: str) -> None:
    app = typer.Typer()
    app.command()(pack)
    assert CliRunner().invoke(app, words).stdout == f"{['a', 'b']} {box} {label}\n"


@pytest.mark.parametrize("words", [["a"], ["a", "--out", "x", "--width", "10"], ["a", "--out", "x", "--box", "1"]])
def test_a_required_field_a_bound_and_an_unknown_name_are_told(words: list[str]) -> None:
    app = typer.Typer()
    app.command()(pack)
    assert CliRunner().invoke(app, words).exit_code == 2
