"""`vlm launch`: a recipe's training on this machine, or on nodes of a scheduler."""

from pathlib import Path
from typing import Annotated

import typer

from launch.nodes.options import JobOptions, PlaceOptions
from launch.options import grouped

EXAMPLES = """
Start a recipe on one or many nodes, from its newest checkpoint on.

\b
vlm launch recipe.yaml --gpus-per-node 8
  this machine (--dry-run: print exactly what would run)
vlm launch recipe.yaml --nodes 2 --gpus-per-node 8 --meet gpu1:29400
  on each of two machines, of which gpu1 is one
vlm launch recipe.yaml --nodes 2:4 --gpus-per-node 8 --on slurm
vlm launch recipe.yaml --nodes 4 --gpus-per-node 8 --on kubernetes --image i
vlm launch recipe.yaml --nodes 2 --gpus-per-node 8 --on ssh --hostfile hosts
vlm launch recipe.yaml --nodes 2 --gpus-per-node 8 --show-config

Ranks that end are started again with --resume auto: not after a mistake of yours, and not when they end alike three
times at the same step. With --nodes 2:4 a run goes on with the nodes that are left, and takes in those that come back.
On SIGTERM, SIGUSR1 or Ctrl-C the ranks save and stop.
"""


@grouped
def launch(  # noqa: D103, PLR0913 - the options of the command line, and its help below
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="RECIPE")],
    job: JobOptions,
    place: PlaceOptions,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value", metavar="[KEY.PATH=VALUE]...")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and run; do nothing.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configurations of accelerate and DeepSpeed; do nothing.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on although the recipe changed, as in vlm train.")
    ] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run the commands and classes that the recipe names.")] = False,
) -> None:
    from launch.nodes.build import build_job, checked_values, require_pairs
    from launch.nodes.place import PLACES

    changes = [*(overrides or ()), *([] if job.engine is None else [f"engine={job.engine}"])]
    values = checked_values(recipe, changes, trust=trust)
    flags = [flag for flag, is_set in (("--allow-changes", allow_changes), ("--trust", trust)) if is_set]
    planned = build_job(job, recipe, changes, flags, Path(str(values["run"])))
    require_pairs(planned, values)
    if show_config:
        from launch.nodes.show_config import config_text
        from launch.recipe import check_recipe

        print(config_text(check_recipe(values, recipe), planned.nodes.most, planned.ranks), end="")
        return
    place_class = PLACES.find(job.on)
    place.require_taken(job.on, place_class)
    there = place_class(planned, place)
    if dry_run:
        print(there.shown())
        return
    there.start()


launch.__doc__ = EXAMPLES
