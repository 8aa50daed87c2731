"""A recipe as commands take it: the arguments that name and change it, and its values, checked."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vlm.errors import EveryRankError
from vlm.imports import fast_imports
from vlm.terminal import one_line

if TYPE_CHECKING:
    from launch.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="RECIPE")]
OptionalRecipe = Annotated[
    str | None, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="[RECIPE]")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value", metavar="[KEY.PATH=VALUE]...")]
TrustRecipe = Annotated[
    bool,
    typer.Option("--trust", help="Run the commands and classes that the recipe names (docs/what-is-a-program.md)."),
]


def checked_recipe(name: str, overrides: list[str] | None, *, trust: bool, tell: bool = False) -> "Recipe":
    """The recipe, read before torch is imported, which takes seconds: most mistakes are told at once.

    So is what is about to be done, where that is to be told.
    """
    from launch.quick_check import quick_problem
    from launch.recipe_file import read_recipe

    path, values = read_recipe(name, overrides or (), trust=trust)
    if "torch" not in sys.modules and (problem := quick_problem(values)) is not None:
        raise EveryRankError(f"{path}: {problem}")
    if tell and os.environ.get("RANK", "0") == "0":
        from launch.first_line import first_line

        print(one_line(first_line(name, values)), flush=True)
    with fast_imports():
        from launch.recipe import check_recipe

    return check_recipe(values, str(path))
