"""Options of commands whose work can be shared among processes of one machine or of many."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from vlm.errors import UserError

if TYPE_CHECKING:
    from data.pools.base import Pool

_OPTIONS = {"ray_address": ("--ray-address", "ray"), "sbatch": ("--sbatch", "slurm")}


@dataclass(frozen=True)
class PlaceOptions:
    """Where work is done that processes share."""

    on: Annotated[str, typer.Option(help="Where: local, ray (a cluster's nodes) or slurm (an array's tasks).")] = (
        "local"
    )
    ray_address: Annotated[str | None, typer.Option(help="With --on ray: the cluster; default: RAY_ADDRESS.")] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --on slurm: more for sbatch; repeatable."),
    ] = None

    def require_taken(self) -> None:
        """Raise UserError for an option of another place."""
        for name, (option, place) in _OPTIONS.items():
            if getattr(self, name) and self.on != place:
                raise UserError(f"{option}: an option of --on {place}, found --on {self.on}")

    def start(self, workers: int | None, *, gpu: bool = False) -> "Pool":
        """The processes; with `gpu`, each on a GPU of its own where a cluster has any.

        Raises:
            UserError: no such place, an option of another one, or what the place itself needs is missing.
        """
        from data.pools.base import POOLS, PoolOptions

        self.require_taken()
        try:
            kind = POOLS.find(self.on)
        except UserError as error:
            raise UserError(f"--on: {error}") from None
        return kind.start(PoolOptions(workers, self.ray_address, tuple(self.sbatch or ()), gpu))


@dataclass(frozen=True)
class WorkerOptions(PlaceOptions):
    """Where work is done, and by how many processes."""

    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Processes; default: one a core, 8 tasks of Slurm.")
    ] = None

    def open(self) -> "Pool":
        """The processes as asked for. Raises as `start`."""
        return self.start(self.workers)


def work_for(address: str, key_file: str) -> None:
    """Be a worker of the command that listens at HOST:PORT, whose key lies in a file. Raises UserError."""
    from data.pools.coordinator import serve_jobs
    from vlm.paths import local_path

    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"{address:.100}: no address; it is HOST:PORT")
    try:
        key = local_path(key_file, "--key").read_bytes()
    except OSError as error:
        raise UserError(f"--key: {key_file}: {error.strerror}") from error
    print(f"{serve_jobs(host, int(port), key)} jobs done")
