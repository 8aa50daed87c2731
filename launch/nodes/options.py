"""The options of `vlm launch`: those of every job, and those that one place or another takes."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from vlm.errors import UserError

if TYPE_CHECKING:
    from launch.nodes.place import Place

_SLURM, _KUBERNETES, _SSH = "Slurm", "Kubernetes", "ssh"


@dataclass(frozen=True)
class JobOptions:
    """What is said of a job wherever it runs."""

    on: Annotated[str, typer.Option(help="local, slurm, kubernetes, ssh, or your own as package.module:Class.")] = (
        "local"
    )
    nodes: Annotated[str, typer.Option(help="So many; 2:4 goes on with those that are left, at least 2.")] = "1"
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Ranks a node; default: one a GPU of this machine, or one.")
    ] = None
    engine: Annotated[str | None, typer.Option(help="The same as engine=E.")] = None
    name: Annotated[str | None, typer.Option(help="The job's name; default: that of the run.")] = None
    max_restarts: Annotated[
        int, typer.Option(min=0, max=10**6, help="A node starts its ranks again at most so often.")
    ] = 100
    wait: Annotated[
        int, typer.Option(min=3, max=86_400, help="Seconds that a lost node is waited for before others go on.")
    ] = 30
    grace: Annotated[
        int, typer.Option(min=1, max=86_400, help="Seconds that ranks have to save when they are to stop.")
    ] = 120
    program: Annotated[str | None, typer.Option(help="How vlm is started on the nodes; default: as here.")] = None


@dataclass(frozen=True)
class PlaceOptions:
    """What one place or another takes; None or empty where nothing was said."""

    meet: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="local, ssh: where the nodes meet; the same on each of them."),
    ] = None
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.", rich_help_panel=_SLURM)] = None
    account: Annotated[str | None, typer.Option(help="Slurm's account.", rich_help_panel=_SLURM)] = None
    time: Annotated[
        str | None,
        typer.Option(help="The time limit, as in 1-12:00:00; the job goes on after it.", rich_help_panel=_SLURM),
    ] = None
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, max=10**5, help="Default: all of a node, alone.", rich_help_panel=_SLURM)
    ] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="One more option of sbatch.", rich_help_panel=_SLURM),
    ] = None
    container: Annotated[
        str | None,
        typer.Option(help="An image: of pyxis, or a .sif file for apptainer.", rich_help_panel=_SLURM),
    ] = None
    mount: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:PATH]", help="What the container sees of the disks.", rich_help_panel=_SLURM),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(help="A folder on each node for copies of shards: data.cache.folder.", rich_help_panel=_SLURM),
    ] = None
    image: Annotated[str | None, typer.Option(help="The container image.", rich_help_panel=_KUBERNETES)] = None
    namespace: Annotated[str | None, typer.Option(help="Of the objects.", rich_help_panel=_KUBERNETES)] = None
    volume: Annotated[
        list[str] | None,
        typer.Option(metavar="CLAIM:PATH", help="A claim and where it is mounted.", rich_help_panel=_KUBERNETES),
    ] = None
    workload: Annotated[
        str | None,
        typer.Option(help="pytorchjob (the training operator), or job (an indexed Job).", rich_help_panel=_KUBERNETES),
    ] = None
    hostfile: Annotated[
        str | None, typer.Option(help="A host a line, as DeepSpeed reads it.", rich_help_panel=_SSH)
    ] = None
    transport: Annotated[
        str | None,
        typer.Option(help="DeepSpeed's launcher: pdsh, openmpi, impi, mvapich.", rich_help_panel=_SSH),
    ] = None

    def require_taken(self, on: str, place: type["Place"]) -> None:
        """Refuse what was said and means nothing at this place. Raises UserError."""
        for field in fields(self):
            if getattr(self, field.name) and field.name not in place.takes:
                taken = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(place.takes)) or "none"
                raise UserError(
                    f"--{field.name.replace('_', '-')} means nothing with --on {on}; its own options: {taken}"
                )
