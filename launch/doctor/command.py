"""`vlm doctor`: all checks in order on all ranks, a line each, and an exit code."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import launch.doctor.all_checks  # noqa: F401 - registers them
from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding, counted, worst
from launch.parts import engine_settings
from launch.recipe import Recipe
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.errors import EveryRankError, UserError, nearest
from vlm.paths import output_file, write_output
from vlm.training.engines.base import EngineSettings
from vlm.training.together import ranks_together

_PATIENCE = 120.0  # seconds that ranks wait for each other, where no recipe says


def examine(recipe: Recipe | None, only: Sequence[str] = (), json_file: Path | None = None) -> bool:
    """Run the checks, print what they find on rank 0, and say whether nothing fails. Collective under a launcher.

    `only` names the checks to run; by default all that need no recipe, and with one the others too. Raises
    EveryRankError for a check that is not there, or that needs a recipe where none is given.
    """
    target = None if json_file is None else output_file(json_file, "--json")
    chosen = _chosen(recipe, only)
    settings = EngineSettings("ddp", 1) if recipe is None else engine_settings(recipe, recipe.max_grad_norm)
    patience = Patience(_PATIENCE if recipe is None else recipe.data.patience)
    with ranks_together(settings, patience=patience) as (accelerator, _):
        place = Place(World.current(accelerator.device), recipe, accelerator)
        findings: list[Finding] = []
        for check in chosen:
            found = everywhere(check, place)
            findings += found
            if place.world.is_main:
                for finding in found:
                    print(finding.line, flush=True)
        if place.world.is_main:
            print(counted(findings))
            if target is not None:
                write_output(target, json.dumps(as_json(findings, place.world.size), indent=2) + "\n", "--json")
        place.world.barrier()
    return worst(findings) != "fail"


def _chosen(recipe: Recipe | None, only: Sequence[str]) -> list[Check]:
    known = CHECKS.all()
    for name in only:
        if name not in known:
            raise EveryRankError(f"--only: there is no check {name!r}; {nearest(name, known)}")
        if known[name].needs_recipe and recipe is None:
            raise EveryRankError(f"--only: {name} needs a RECIPE")
    return [
        check()
        for name, check in known.items()
        if (name in only if only else True) and (recipe is not None or not check.needs_recipe)
    ]


def everywhere(check: Check, place: Place) -> list[Finding]:
    """What all ranks found: once where they agree, else with the ranks that it is of. Collective."""
    by_rank = place.world.gather_objects(list(_told(check, place)))
    ranks_of: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks_of.setdefault(finding, []).append(rank)
    of_all = [finding for finding, ranks in ranks_of.items() if len(ranks) == len(by_rank)]
    alone = {finding: ranks for finding, ranks in ranks_of.items() if finding not in of_all}
    shown = [finding for finding, ranks in alone.items() if finding.state != "ok" or ranks[0] == 0]
    return [*of_all, *(_of_ranks(finding, alone[finding]) for finding in shown)]


def _told(check: Check, place: Place) -> Iterator[Finding]:
    try:
        yield from check.findings(place)
    except UserError as error:
        name = next(name for name, known in CHECKS.all().items() if isinstance(check, known))
        yield Finding(name, "fail", str(error), "what the line names")


def _of_ranks(finding: Finding, ranks: Sequence[int]) -> Finding:
    more = f" and {len(ranks) - 1:,} more" if len(ranks) > 1 else ""
    return Finding(finding.check, finding.state, f"rank {ranks[0]}{more}: {finding.words}", finding.fix)


def as_json(findings: Sequence[Finding], ranks: int) -> dict[str, object]:
    """The findings in plain values."""
    return {
        "state": worst(findings),
        "ranks": ranks,
        "findings": [{"check": one.check, "state": one.state, "found": one.words, "fix": one.fix} for one in findings],
    }
