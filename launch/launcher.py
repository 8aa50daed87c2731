"""Which rank this process is: as torchrun and accelerate say it, or from the variables of srun and mpirun."""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

from vlm.errors import EveryRankError, UserError

_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below those that systems give to outgoing connections
_MAX_RANKS = 1_000_000


class _Names(NamedTuple):
    """How one launcher calls what a process must know, and what is the same in all processes of one start."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    start: tuple[str, ...]


# On Slurm an mpirun starts its own helpers by srun, one a machine; every process of theirs has srun's variables too.
_LAUNCHERS = {
    "mpirun": _Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    "mpirun of MVAPICH": _Names(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        (),
    ),
    "mpiexec": _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_KVS", "HYDRA_JOB_ID")),
    "srun": _Names(
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
}


def join_launcher(environ: MutableMapping[str, str] | None = None) -> str | None:
    """Write the variables that torch reads where only srun or an mpirun said who this process is; who did it.

    None: nobody had to (a single process, torchrun, accelerate). Where ranks cannot be told, nothing is started.

    Raises:
        UserError: several processes were meant, and it cannot be known which of them this one is.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        _check_ours(environ)
        return None
    for launcher, names in _LAUNCHERS.items():
        size = _number(environ, names.size)
        if size is None or size == 1 or _is_of_srun(launcher, environ):
            continue
        rank = _number(environ, names.rank)
        if rank is None or rank >= size:
            raise UserError(f"{launcher} started {size} processes, and {names.rank} says not which of them this is")
        local_rank = _number(environ, names.local_rank)
        address = _address(environ, launcher, names, size)
        port = _FIRST_PORT + zlib.crc32("/".join(environ.get(name, "") for name in names.start).encode()) % _NUM_PORTS
        environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank if local_rank is None else local_rank))
        environ.setdefault("MASTER_ADDR", address)
        environ.setdefault("MASTER_PORT", str(port))
        _check_port(environ)
        return launcher
    _refuse_lonely(environ)
    _be_alone(environ)
    return None


def take_local_rank(arguments: Sequence[str], environ: MutableMapping[str, str]) -> list[str]:
    """The arguments without the `--local_rank=N` that DeepSpeed's and torch's old launchers put before them."""
    if not arguments or not (match := re.fullmatch(r"--local[_-]rank=(\d{1,6})", arguments[0])):
        return list(arguments)
    environ.setdefault("LOCAL_RANK", match[1])
    return list(arguments[1:])


def _is_of_srun(launcher: str, environ: Mapping[str, str]) -> bool:
    """Whether mpiexec's variables come from Slurm, which says the same, and more, by its own."""
    return launcher == "mpiexec" and "SLURM_STEP_NUM_TASKS" in environ and "MPI_LOCALRANKID" not in environ


def _be_alone(environ: MutableMapping[str, str]) -> None:
    """Take away a single process's place among ranks: accelerate would want to meet others, nobody knows where."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environ.pop(name, None)


def _check_port(environ: Mapping[str, str]) -> None:
    text = environ["MASTER_PORT"]
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or not 0 < int(text) < 65_536:
        raise EveryRankError(f"MASTER_PORT={text!r:.60} is no port; ports are 1 to 65535")


def _check_ours(environ: MutableMapping[str, str]) -> None:
    """Refuse what torchrun would never set; a rank that does not know its place trains on its own, unasked."""
    size, rank = _number(environ, "WORLD_SIZE"), _number(environ, "RANK")
    if size is None or rank is None:
        missing = "WORLD_SIZE" if size is None else "RANK"
        raise UserError(f"the launcher sets only one of RANK and WORLD_SIZE; {missing} is missing")
    if rank >= size:
        raise UserError(f"RANK={rank}: a WORLD_SIZE of {size} has ranks 0 to {size - 1}")
    if size == 1:
        if not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
            _be_alone(environ)
        return
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
        raise EveryRankError(f"the launcher sets RANK and WORLD_SIZE={size}, but not {' and '.join(absent)}")
    _check_port(environ)
    if _number(environ, "LOCAL_RANK") is None:
        if (_number(environ, "LOCAL_WORLD_SIZE") or size) != size:
            raise EveryRankError(f"the launcher sets RANK and WORLD_SIZE={size}, but not LOCAL_RANK")
        environ["LOCAL_RANK"] = str(rank)


def _refuse_lonely(environ: Mapping[str, str]) -> None:
    """Refuse a single process where somebody asked for several."""
    tasks = _number(environ, "SLURM_NTASKS")
    if tasks is not None and tasks > 1 and "SLURM_PROCID" in environ:
        raise UserError(
            f"Slurm gave this job {tasks} tasks, and this process was not started by srun: "
            "start it as `srun vlm ...`, or by torchrun, or ask for one task (--ntasks 1)"
        )
    if "ACCELERATE_MIXED_PRECISION" in environ and environ.get("MASTER_ADDR"):
        raise UserError(
            "accelerate was asked for several processes and started one, as it does on CPUs: "
            "start them as `torchrun --nproc-per-node N --no-python vlm ...`"
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) > _MAX_RANKS:
        raise UserError(f"{name}={text!r:.60} is no number of processes")
    return int(text)


def _address(environ: Mapping[str, str], launcher: str, names: _Names, size: int) -> str:
    """Where rank 0 is."""
    if given := environ.get("MASTER_ADDR"):
        return given
    if launcher == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        alone = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1"
        return "127.0.0.1" if alone or not nodes else first_node(nodes)
    if environ.get(names.local_size) == str(size):
        return "127.0.0.1"
    raise EveryRankError(f"{launcher} started {size} processes on several machines: set MASTER_ADDR to that of rank 0")


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, as in `gpu[007-012,015],login`."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    ranges, _, tail = rest.partition("]")
    first = ranges.partition(",")[0].partition("-")[0]
    return f"{name}{first}{tail.partition(',')[0]}"
