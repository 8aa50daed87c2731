"""What a worker on another machine needs to do a job as this process would."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import data
import vlm
from data.pools.base import Job, Result
from vlm.errors import UserError

MOST_LOSSES = 5  # of workers that end with the same job unfinished


def enter(folder: str) -> None:
    """Make the paths of jobs mean what they mean in `folder`. Raises UserError where this machine has none such."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()}: {folder}: {error.strerror}; every machine needs the folder that the command was "
            "started in"
        ) from error


def work_in(folder: str, work: Callable[[Job], Result], job: Job) -> Result:
    """`work(job)`, in a folder."""
    enter(folder)
    return work(job)


def environment() -> dict[str, str]:
    """The variables by which another Python finds these packages, and does with one core."""
    folders = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (vlm, data))
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*folders, *([before] if before else [])]), "OMP_NUM_THREADS": "1"}


def lost_too_often(ended: str) -> UserError:
    """The end of a job that no worker outlives; `ended` says where the last one ended."""
    return UserError(
        f"{MOST_LOSSES} workers were lost over the same job, perhaps for want of memory ({ended}); what is done is "
        "kept: start the same command again to go on"
    )
