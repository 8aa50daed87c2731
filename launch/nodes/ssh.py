"""Machines by ssh: DeepSpeed's own launcher starts a small script on each host of a hostfile."""

import re
import shlex
import sys
from pathlib import Path

from launch.nodes.job import Job, absolute_recipe, beside
from launch.nodes.meeting import Meeting
from launch.nodes.options import PlaceOptions
from launch.nodes.place import SchedulerPlace, Written
from vlm.errors import UserError, nearest
from vlm.paths import local_path, shown

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,250}[A-Za-z0-9])?")
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
# By what DeepSpeed knows that one is there, and what it runs then. Its way by mpich starts no program but Python's.
_TRANSPORTS = {
    "pdsh": ("pdsh",),
    "openmpi": ("ompi_info", "mpirun"),
    "impi": ("mpirun",),
    "mvapich": ("mpiname", "mpirun"),
}
_PORT = 29_400

_SCRIPT = """\
#!/usr/bin/env bash
# DeepSpeed's launcher starts this once on each host, as if it were a rank; it starts the ranks of its host.
# shellcheck disable=SC2016  # what stands in quotes is meant to the letter
set -eu
unset CUDA_VISIBLE_DEVICES
cd {folder}
exec {command}
"""


class Ssh(SchedulerPlace):
    """A script and a hostfile beside the run directory, on a disk that all hosts have under the same name."""

    takes = frozenset({"hostfile", "transport", "meet"})

    def __init__(self, job: Job, options: PlaceOptions) -> None:
        super().__init__(job, options)
        self.transport = options.transport or "pdsh"
        if self.transport not in _TRANSPORTS:
            raise UserError(f"--transport: unknown {shown(self.transport)}; {nearest(self.transport, _TRANSPORTS)}")
        if options.hostfile is None:
            raise UserError("--hostfile: --on ssh needs the names of its hosts, one a line")
        self.hosts = read_hosts(local_path(options.hostfile, "--hostfile"))
        if len(self.hosts) < job.nodes.most:
            raise UserError(f"--hostfile: {options.hostfile} has {len(self.hosts)} hosts for {job.nodes.most} nodes")
        self.meeting = Meeting(self.hosts[0], _PORT) if options.meet is None else Meeting.parse(options.meet)
        self.script = beside(job.run, ".node.sh").absolute()
        self.hostfile = beside(job.run, ".hosts").absolute()
        for path in (self.script, self.hostfile):  # it goes through a shell on each host, unquoted
            if not _PLAIN.fullmatch(str(path)):
                raise UserError(
                    f"run: {shown(str(path))} goes through DeepSpeed's shell: letters, digits and ./_+- only"
                )

    def files(self) -> list[Written]:  # noqa: D102
        job = self.job.with_recipe(absolute_recipe(self.job.recipe))
        command = shlex.join([*job.node_command(), "--meet", str(self.meeting)])
        text = _SCRIPT.format(folder=shlex.quote(str(Path.cwd())), command=command)
        hosts = "".join(f"{host} slots=1\n" for host in self.hosts[: job.nodes.most])
        return [Written(self.hostfile, hosts), Written(self.script, text, is_program=True)]

    def command(self) -> list[str]:  # noqa: D102
        return [
            *("deepspeed", "--hostfile", str(self.hostfile), "--launcher", self.transport),
            *("--force_multi", "--no_ssh_check", "--quiet"),
            *("--master_addr", self.hosts[0]),  # or it would ask the host itself
            *("--no_python", "--no_local_rank", str(self.script)),
        ]

    def programs(self) -> list[str]:  # noqa: D102
        return [*super().programs(), *_TRANSPORTS[self.transport]]

    def run_command(self) -> None:
        """Run it as long as the run takes; what ended that is told by the ranks, and the exit code is theirs."""
        if code := self.code_of_command():
            sys.exit(code)

    def command_words(self) -> str:  # noqa: D102
        return shlex.join(self.command())


def read_hosts(path: Path) -> list[str]:
    """The hosts of a hostfile, as DeepSpeed and MPI write it: a name, and perhaps `slots=N`. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--hostfile: {path} cannot be read") from None
    hosts = [words[0] for line in lines if (words := line.partition("#")[0].split())]
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise UserError(f"--hostfile: {path}: {shown(host)} is no name of a host")
    if len(set(hosts)) < len(hosts):
        raise UserError(f"--hostfile: {path} names a host twice")
    return hosts
