"""From the words of a command line to a job: the recipe is read, and the ranks of this machine are counted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.nodes.job import Job, Nodes, job_name, program_here
from launch.nodes.options import JobOptions
from launch.quick_check import quick_problem
from launch.recipe_file import read_recipe
from vlm.errors import UserError
from vlm.paths import local_path


def checked_values(recipe: str, changes: Sequence[str], *, trust: bool) -> dict[str, Any]:
    """The recipe's values, looked at without torch: most mistakes are told before anything is written or asked for.

    Raises:
        UserError: as `vlm train` of this recipe would.
    """
    path, values = read_recipe(recipe, changes, trust=trust)
    if (problem := quick_problem(values)) is not None:
        raise UserError(f"{path}: {problem}")
    return values


def build_job(options: JobOptions, recipe: str, changes: Sequence[str], flags: Sequence[str], run: Path) -> Job:
    """The job that the options describe. Raises UserError."""
    nodes = Nodes.parse(options.nodes)
    if options.gpus_per_node is None and options.on != "local":
        raise UserError(f"--gpus-per-node: how many ranks does a node of --on {options.on} have?")
    run = local_path(run, "run")
    return Job(
        recipe=recipe,
        overrides=tuple(changes),
        flags=tuple(flags),
        nodes=nodes,
        ranks=options.gpus_per_node or _gpus_here(),
        run=run,
        name=job_name(options.name, run),
        program=_program(options),
        restarts=options.max_restarts,
        wait=options.wait,
        grace=options.grace,
    )


def require_pairs(job: Job, values: Mapping[str, Any]) -> None:
    """Refuse more ranks than a step has pairs: a queue may be long. Raises UserError, as the ranks would."""
    pairs = values.get("global_batch")
    if isinstance(pairs, int) and pairs < job.most_ranks:
        raise UserError(f"global_batch: {pairs} pairs leave some of {job.most_ranks} ranks without any")


def _program(options: JobOptions) -> tuple[str, ...]:
    """In a container `vlm` is another program than here."""
    in_container = options.on == "kubernetes" and options.program is None
    return ("vlm",) if in_container else program_here(options.program)


def _gpus_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())
