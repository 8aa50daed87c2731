"""The options of `vlm plan` and of all that plans: where a run is to be, and what nobody can look up."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launch.plan.plan import Question


@dataclass(frozen=True)
class PlanOptions:
    """Where a run is to be, by the command line."""

    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Machines.")] = 1
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="Ranks on each of them.")] = 8
    gpu: Annotated[str, typer.Option(help="h100, a100-80, ...: a name of the table, or a YAML file.")] = "h100"
    engine: Annotated[str | None, typer.Option(help="Instead of the recipe's: ddp, zero1-3, fsdp.")] = None
    price: Annotated[float | None, typer.Option(min=0, max=1e6, help="Of a GPU-hour.")] = None
    samples: Annotated[
        int | None, typer.Option(min=1, max=10**13, help="In an epoch; default: by the data's index.")
    ] = None
    length: Annotated[
        int | None, typer.Option(min=2, max=10**5, help="Tokens of a text; default: all that the tower reads.")
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None

    def question(self) -> "Question":
        """What is asked of a plan. Raises UserError for a GPU that nobody knows, or an engine that is none of ours."""
        from launch.plan.duration import Machine
        from launch.plan.engines import ENGINES, Cluster
        from launch.plan.gpu import gpu_named
        from launch.plan.plan import Question
        from vlm.errors import UserError, nearest

        if self.engine is not None and self.engine not in ENGINES:
            raise UserError(f"--engine: there is no {self.engine!r}; {nearest(self.engine, ENGINES)}")
        machine = Machine(gpu_named(self.gpu), Cluster(self.nodes, self.gpus_per_node))
        return Question(machine, self.engine, self.price, self.samples, self.length)
