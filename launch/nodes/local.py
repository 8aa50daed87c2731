"""This machine: its ranks under torchrun's elastic agent, alone or as one of the nodes that meet somewhere."""

import os
import shlex
import socket
import sys
import time
from typing import NoReturn

from launch.nodes.job import Job
from launch.nodes.meeting import Here, Meeting, here
from launch.nodes.options import PlaceOptions
from launch.nodes.place import Place
from vlm.ends.watch import watching
from vlm.errors import UserError
from vlm.training.owner import LAUNCH

JOIN_SECONDS = 600
_LOST_BEATS = 6  # a busy machine misses some
_LONGEST_BEAT = 5
_STORE_SECONDS = 60
_STARTED_BY = "TORCHELASTIC_RUN_ID"
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Local(Place):
    """Starts this node's ranks, and waits for their end."""

    takes = frozenset({"meet"})

    def __init__(self, job: Job, options: PlaceOptions) -> None:
        super().__init__(job, options)
        self.meeting = None if options.meet is None else Meeting.parse(options.meet)
        if self.meeting is None and job.nodes.most > 1:
            raise UserError(
                f"--on local starts the ranks of one node: of {job.nodes} nodes each starts its own, by this command "
                "with --meet HOST:PORT, HOST being the first of them"
            )
        if _STARTED_BY in os.environ:
            raise UserError("vlm launch starts the ranks itself: start it without torchrun, once on each node")

    def shown(self) -> str:  # noqa: D102
        try:
            place = None if self.meeting is None else here(self.meeting)
        except OSError as error:
            raise UserError(f"--meet: {self.meeting}: {error.strerror}") from None
        settings = shlex.join(f"{name}={value}" for name, value in self.environment(place).items())
        return f"{settings} \\\n{shlex.join(self.torchrun(place))}"

    def start(self) -> NoReturn:  # noqa: D102
        from launch.nodes.agent import run_node
        from launch.nodes.restarts import Restarts

        with watching() as watch:
            place = self._find_place()
            for name in _OF_RANKS:  # of the launcher that started this node, for which it is one rank
                os.environ.pop(name, None)
            os.environ.update(self.environment(place))
            name = "" if place is None else f"node {place.address}: "
            with watch.keeping_requests():
                code = run_node(
                    lambda: self.torchrun(place),
                    self.job.nodes,
                    Restarts(self.job.run),
                    JOIN_SECONDS,
                    lambda line: watch.teller.notice(f"{name}{line}"),
                )
        sys.exit(code)

    def _find_place(self) -> Here | None:
        """This node's address among the others; the first node's name may become known a while after it started."""
        if self.meeting is None:
            return None
        until = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                return here(self.meeting)
            except OSError as error:
                if time.monotonic() > until:
                    raise UserError(f"--meet: {self.meeting}: {error.strerror} after {JOIN_SECONDS} s") from None
                time.sleep(1)

    def environment(self, place: Here | None) -> dict[str, str]:
        """What the ranks find in their environment beside what torchrun says."""
        job = self.job.name if self.meeting is None else f"{self.job.name}@{self.meeting}"
        # Each meeting has a store of its own: torch would go on with one that is full of the last meeting's words, and
        # a node that comes later would wait for words that were said once.
        settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.meeting is not None:
            settings[LAUNCH] = "/".join([job, *filter(None, [os.environ.get("SLURM_JOB_ID")])])
        if place is not None and place.interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            settings["GLOO_SOCKET_IFNAME"] = place.interface
        if "OMP_NUM_THREADS" not in os.environ:
            settings["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.job.ranks))
        return settings

    def torchrun(self, place: Here | None) -> list[str]:
        """The command that this is: plain torchrun would start the same ranks, but restart them into any wall."""
        beat = max(1, min(_LONGEST_BEAT, self.job.wait // _LOST_BEATS))
        conf = {
            "join_timeout": JOIN_SECONDS,
            "last_call_timeout": self.job.wait,
            "keep_alive_interval": beat,
            "keep_alive_max_attempt": _LOST_BEATS,
            "read_timeout": min(_STORE_SECONDS, 2 * self.job.wait),
        }
        if place is None:
            where = ["--rdzv-endpoint", "localhost:0", "--rdzv-id", self.job.name]
            where += ["--local-addr", "localhost"]
        else:
            conf["is_host"] = int(place.is_host and not _somebody_at(self.meeting))
            where = ["--rdzv-endpoint", str(self.meeting), "--rdzv-id", self.job.name, "--local-addr", place.address]
        program, *arguments = self.job.train_command()
        return [
            *("torchrun", "--nnodes", str(self.job.nodes), "--nproc-per-node", str(self.job.ranks)),
            *("--rdzv-backend", "c10d", *where),
            *("--rdzv-conf", ",".join(f"{key}={value}" for key, value in conf.items())),
            *("--max-restarts", str(self.job.restarts), "--shutdown-timeout", str(self.job.grace)),
            *(
                "--no-python",
                program,
                *(word.replace("$", "$$") for word in arguments),
            ),  # "${local_rank}" is torchrun's
        ]


def _somebody_at(meeting: Meeting | None) -> bool:
    """Whether some process of this machine has begun the meeting already: another node, where they share one."""
    assert meeting is not None
    try:
        with socket.create_connection((meeting.host.strip("[]"), meeting.port), timeout=1):
            return True
    except OSError:
        return False
