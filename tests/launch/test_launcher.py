"""Ranks come from whichever launcher there was, or one line says that they cannot be told."""

import pytest

from launch.launcher import first_node, join_launcher
from vlm.errors import UserError


def joined(**environ: str) -> dict[str, str]:
    """The values that torch reads after joining."""
    join_launcher(environ)
    return {
        name: environ[name] for name in sorted(environ) if not name.startswith(("SLURM", "OMPI", "PMI", "MV2", "MPI"))
    }


SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_NODELIST": "gpu[001-008]",
}


def test_tasks_of_srun_are_ranks_that_meet_on_the_first_node() -> None:
    ranks = [joined(**SRUN, SLURM_PROCID=str(n), SLURM_LOCALID=str(n % 2)) for n in range(4)]
    assert [(one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) for one in ranks] == [
        ("0", "4", "0"),
        ("1", "4", "1"),
        ("2", "4", "0"),
        ("3", "4", "1"),
    ]
    assert {one["MASTER_ADDR"] for one in ranks} == {"gpu007"}
    (port,) = {one["MASTER_PORT"] for one in ranks}
    assert 20_000 <= int(port) < 32_000
    other = joined(**{**SRUN, "SLURM_STEP_ID": "1"}, SLURM_PROCID="0", SLURM_LOCALID="0")
    assert other["MASTER_PORT"] != port  # two steps of one job do not meet


def test_on_one_node_ranks_meet_there_and_what_is_set_stays() -> None:
    one = {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert joined(**one)["MASTER_ADDR"] == "127.0.0.1"
    assert joined(**one, MASTER_ADDR="host", MASTER_PORT="5")["MASTER_ADDR"] == "host"
    assert joined(**one, MASTER_ADDR="host", MASTER_PORT="5")["MASTER_PORT"] == "5"


@pytest.mark.parametrize(
    "environ",
    [
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {
            "MV2_COMM_WORLD_RANK": "1",
            "MV2_COMM_WORLD_SIZE": "2",
            "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "2",
        },
    ],
)
def test_processes_of_mpirun_are_ranks(environ: dict[str, str]) -> None:
    found = joined(**environ)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert found["MASTER_ADDR"] == "127.0.0.1"
    several = {name: "1" if "LOCAL" in name else value for name, value in environ.items()}
    with pytest.raises(UserError, match="on several machines: set MASTER_ADDR to that of rank 0"):
        join_launcher(several)


def test_mpirun_on_slurm_goes_before_the_srun_that_started_its_helpers() -> None:
    helper = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "MASTER_ADDR": "gpu007"}
    open_mpi = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    hydra = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    for names in (open_mpi, hydra):
        found = joined(**helper, **dict(zip(names, ("6", "8", "2"), strict=True)))
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("6", "8", "2")
    # Slurm's own PMI knows no local rank; Slurm does.
    found = joined(**helper, PMI_RANK="1", PMI_SIZE="4")
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "4", "0")


@pytest.mark.parametrize("environ", [{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}])
def test_a_single_process_that_knows_no_meeting_point_needs_none(environ: dict[str, str]) -> None:
    """A container's leftovers: torch would look for MASTER_ADDR and end in a traceback."""
    assert joined(**environ) == {}


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ",
    [{}, TORCHRUN, {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, {"SLURM_NTASKS": "1"}],
)
def test_what_torchrun_says_goes_first_and_one_process_stays_one(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert join_launcher(environ) is None
    assert environ == before


def test_a_missing_local_rank_on_one_machine_is_the_rank() -> None:
    without = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    assert joined(**without)["LOCAL_RANK"] == "1"  # accelerate would train alone


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            "Slurm gave this job 2 tasks, and this process was not",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID says not which of them"),
        ({"SLURM_STEP_NUM_TASKS": "two", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS='two' is no number"),
        ({"PMI_SIZE": "2", "PMI_RANK": "2"}, "PMI_RANK says not which"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2: a WORLD_SIZE of 2 has ranks 0 to 1"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http' is no port; ports are 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT='65536' is no port"),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": "0"}, "MASTER_PORT='0' is no port"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "accelerate was asked for several processes and started one",
        ),
    ],
)
def test_ranks_that_cannot_be_told_are_one_line(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        join_launcher(environ)


def test_the_first_of_slurms_nodes() -> None:
    for nodes, first in {
        "n1": "n1",
        "n1,n2": "n1",
        "gpu[007-012,015],login": "gpu007",
        "a[3,5-6]-ib": "a3-ib",
        "login,gpu[1-2]": "login",
    }.items():
        assert first_node(nodes) == first
