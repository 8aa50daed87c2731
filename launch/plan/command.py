"""`vlm plan`: the plan of a recipe, printed and written."""

import json

from launch.plan.options import PlanOptions
from launch.plan.plan import make_plan
from launch.plan.printed import as_json, print_plan
from launch.recipe import Recipe
from vlm.paths import output_file, write_output
from vlm.terminal import Terminal


def plan_recipe(recipe: Recipe, name: str, options: PlanOptions) -> None:
    """Print the plan of a recipe, and write it where JSON was asked for. Raises UserError as `make_plan`."""
    target = None if options.json_file is None else output_file(options.json_file, "--json")
    plan = make_plan(recipe, name, options.question())
    print_plan(plan, Terminal())
    if target is not None:
        write_output(target, json.dumps(as_json(plan), indent=2) + "\n", "--json")
