"""Slurm: a batch script that starts an agent on each node, saves before its time is over, and goes on after."""

import re
import shlex
from pathlib import Path

from launch.nodes.job import Job, absolute_recipe, beside
from launch.nodes.options import PlaceOptions
from launch.nodes.place import SchedulerPlace, Written
from vlm.errors import UserError
from vlm.paths import local_path, shown

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@/+*%=-]{0,250}")
_KEY = re.compile(r"[a-z][a-z-]{0,60}")
_TIME = re.compile(r"\d{1,6}|(\d{1,4}-)?\d{1,4}(:\d{1,2}){1,2}|\d{1,4}-\d{1,2}")
_LEAST_NOTICE = 60  # Slurm looks at its limits once a minute
_OURS = {"nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "job-name"}

_SCRIPT = """\
# One task a node, which starts the ranks of that node: `vlm launch --on local`.
# shellcheck disable=SC2016  # what stands in quotes is meant to the letter
set -u

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 12000))

# The steps are told to save some time before the limit; the job is queued again when they have. Of a pre-emption and an
# end by scancel the steps hear from Slurm itself: the script waits for them.
out_of_time=0
step=
trap 'out_of_time=1; if [ -n "$step" ]; then kill -USR1 "$step"; fi' USR1
trap ':' TERM

{srun} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends a wait, not the step
wait "$step"
code=$?
# 143: all is saved; 138: a step that had not begun.
if [ "$out_of_time" -eq 1 ] && {{ [ "$code" -eq 143 ] || [ "$code" -eq 138 ]; }}; then
  echo "vlm launch: the time is nearly over; job $SLURM_JOB_ID is queued again and goes on from what is saved" >&2
  scontrol requeue "$SLURM_JOB_ID" ||
    echo "vlm launch: it could not be; all is saved, submit it again: sbatch" {script} >&2
fi
exit "$code"
"""


class Slurm(SchedulerPlace):
    """A batch script beside the run directory, which sbatch gets."""

    takes = frozenset({"partition", "account", "time", "cpus_per_node", "sbatch", "container", "mount", "cache"})

    def __init__(self, job: Job, options: PlaceOptions) -> None:
        super().__init__(job, options)
        self.script = beside(job.run, ".sbatch")
        for option, value, pattern in (
            ("--partition", options.partition, _WORD),
            ("--account", options.account, _WORD),
            ("--time", options.time, _TIME),
        ):
            if value is not None and not pattern.fullmatch(value):
                raise UserError(f"{option}: {shown(value)} is nothing that a line of a batch script may hold")
        self._notice = max(_LEAST_NOTICE, 2 * job.grace)
        if options.time is not None and 0 < _seconds(options.time) <= self._notice + _LEAST_NOTICE:
            raise UserError(
                f"--time: {options.time} leaves no time to train: {self._notice} s before its end the run saves "
                "(twice --grace, and at least 60), and Slurm looks at the time once a minute"
            )
        self._more = [_directive(text) for text in options.sbatch or ()]
        self._mounts = [_mount(text) for text in options.mount or ()]
        if self._mounts and options.container is None:
            raise UserError("--mount says what a container sees: name it by --container")
        if options.container is not None and not options.container.isprintable():
            raise UserError(f"--container: {shown(options.container)} is no image")

    def files(self) -> list[Written]:  # noqa: D102
        directives = "\n".join(f"#SBATCH --{one}" for one in self.directives())
        srun = " \\\n  ".join(self._srun())
        body = _SCRIPT.format(srun=srun, script=shlex.quote(str(self.script.absolute())))
        script = f"#!/usr/bin/env bash\n{directives}\n{body}"
        return [Written(self.script, script, is_program=True)]

    def command(self) -> list[str]:  # noqa: D102
        return ["sbatch", str(self.script)]

    def command_words(self) -> str:  # noqa: D102
        return shlex.join(self.command())

    def directives(self) -> list[str]:
        """What the script asks of sbatch."""
        job, options = self.job, self.options
        nodes = f"{job.nodes.least}-{job.nodes.most}" if job.nodes.is_elastic else str(job.nodes.most)
        output = str(Path(f"{job.run}-slurm-%j.out").absolute())
        cpus = "exclusive" if options.cpus_per_node is None else f"cpus-per-task={options.cpus_per_node}"
        asked = [
            f"job-name={job.name}",
            f"nodes={nodes}",
            "ntasks-per-node=1",
            cpus,
            *([] if any(one.startswith(("gres=", "gpus")) for one in self._more) else [f"gpus-per-node={job.ranks}"]),
            *([f"output={output}"] if _WORD.fullmatch(output.lstrip("/")) else []),
            "open-mode=append",
            f"signal=B:USR1@{self._notice}",
            "requeue",
            *(["no-kill"] if job.nodes.is_elastic else []),
        ]
        said = {"partition": options.partition, "account": options.account, "time": options.time}
        return [*asked, *(f"{key}={value}" for key, value in said.items() if value is not None), *self._more]

    def _srun(self) -> list[str]:
        """The step as lines of a command, quoted; what the script fills in stands in double quotes."""
        options = self.options
        cpus = '"$SLURM_CPUS_ON_NODE"' if options.cpus_per_node is None else str(options.cpus_per_node)
        words = ["srun", "--ntasks-per-node=1", f"--cpus-per-task={cpus}", "--cpu-bind=none"]
        words += ["--kill-on-bad-exit=0", "--wait=0", *(["--no-kill"] if self.job.nodes.is_elastic else [])]
        inside: list[str] = []
        if options.container is not None and options.container.endswith(".sif"):
            binds = [word for mount in self._mounts for word in ("--bind", shlex.quote(mount))]
            inside = ["apptainer", "exec", "--nv", *binds, shlex.quote(options.container)]
        elif options.container is not None:
            words.append(f"--container-image={shlex.quote(options.container)}")
            if self._mounts:
                words.append(f"--container-mounts={shlex.quote(','.join(self._mounts))}")
        overrides = () if options.cache is None else (f"data.cache.folder={_folder(options.cache)}",)
        job = self.job.with_recipe(absolute_recipe(self.job.recipe)).with_overrides(overrides)
        lines = [" ".join(words)]
        if inside:
            lines.append(" ".join(inside))
        return [*lines, shlex.join(job.node_command()), '--meet "$head:$port"']


def _directive(text: str) -> str:
    """One more option of sbatch. Raises UserError for what is none, or is the launcher's own."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not _KEY.fullmatch(key) or (equals and not _WORD.fullmatch(value)):
        raise UserError(f"--sbatch: {shown(text)} is no KEY=VALUE that a line of a batch script may hold")
    if key in _OURS:
        raise UserError(f"--sbatch: {key} is what vlm launch says itself; see vlm launch --help")
    return f"{key}{equals}{value}"


def _seconds(text: str) -> int:
    """A time limit in seconds, as sbatch reads it: minutes, or [days-]hours:minutes[:seconds]. 0 is no limit."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # from hours on
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _mount(text: str) -> str:
    if not text.startswith("/") or "," in text or not text.isprintable():
        raise UserError(f"--mount: {shown(text)} is no PATH or PATH:PATH that begins with /")
    return text if ":" in text else f"{text}:{text}"


def _folder(text: str) -> str:
    """A folder on the nodes; a variable in it would be none there, since it is quoted."""
    path = str(local_path(text, "--cache"))
    if not path.startswith("/") or "$" in path:
        raise UserError(
            f"--cache: {shown(text)} is no path from / on, as the nodes know it; variables are not filled in"
        )
    return path
