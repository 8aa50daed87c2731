"""Stand-ins for Slurm's programs, for one job at a time: what they refuse, set and forward is as Slurm documents it.

Run as `python -IS slurm_programs.py FOLDER NAME ARGUMENT...`; they know nothing but Python's own library. Nodes are
addresses of the loopback. What they know of a job lies in FOLDER/JOB.json, where a test reads it.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

# Of sbatch and srun, those that this project says; Slurm knows more. None: without a value.
SBATCH = {
    **dict.fromkeys(("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "output"), r".+"),
    **dict.fromkeys(("partition", "account", "qos"), r".+"),
    **dict.fromkeys(("exclusive", "requeue", "no-requeue", "no-kill"), None),
    "nodes": r"\d+(-\d+)?",
    "open-mode": "append|truncate",
    "signal": r"([RB]+:)?(USR1|TERM)@\d+",
    "time": r"\d+|(\d+-)?\d+(:\d+){1,2}|\d+-\d+",
}
SRUN = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"), r"\d+"),
    "cpu-bind": "none|cores",
    "kill-on-bad-exit": "[01]",
    "wait": r"\d+",
    "no-kill": None,
}
# Slurm sends on what srun gets, but for these.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Job:
    """What is known of one job, from life to life; every change is in its file at once."""

    def __init__(self, folder: Path, number: str) -> None:
        self._path = folder / f"{number}.json"
        self.number = number
        self.facts: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def set(self, **facts: Any) -> None:
        self.facts.update(facts)
        aside = self._path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(self.facts))
        aside.rename(self._path)


def signal_step(tasks: list[int], number: int) -> None:
    """A signal to a step goes to all of its processes, those that its tasks started too."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids, found = [], set(tasks)
    while found:
        pids += sorted(found)
        found = {pid for pid, parent in parents.items() if parent in found}
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def refuse(program: str, words: str) -> NoReturn:
    sys.exit(f"{program}: error: {words}")


def options_of(program: str, known: dict[str, str | None], words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options before the first other word, and the words from there on."""
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        key, equals, value = words.pop(0)[2:].partition("=")
        if key not in known:
            refuse(program, f"unrecognized option '--{key}'")
        pattern = known[key]
        if pattern is not None and not equals and words:
            equals, value = " ", words.pop(0)
        if (pattern is None) == bool(equals) or not re.fullmatch(pattern or "", value):
            refuse(program, f"Invalid --{key} specification: {value!r}")
        options[key] = value
    return options, words


def directives(script: str) -> list[str]:
    """The words of `#SBATCH` lines before the first command, as sbatch reads them."""
    words = []
    for line in script.splitlines()[1:]:
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            words.append(line.removeprefix("#SBATCH ").strip())
    return words


def sbatch(folder: Path, words: list[str]) -> None:
    """Take a copy of the script, say the job's number, and leave the job to a process that runs on."""
    said, rest = options_of("sbatch", SBATCH, words)
    if len(rest) != 1:
        refuse("sbatch", "one script, please")
    text = Path(rest[0]).read_text()
    if not text.startswith("#!"):
        refuse("sbatch", "This does not look like a batch script.  The first line must start with #!")
    options = options_of("sbatch", SBATCH, directives(text))[0] | said
    number = new_number()
    (folder / f"{number}.sbatch").write_text(text)
    Job(folder, number).set(state="PENDING", options=options, lives=[], folder=os.getcwd())
    with Path(os.devnull).open("r+b") as nothing:
        subprocess.Popen(
            [*again(folder), "controller", number],
            start_new_session=True,
            stdin=nothing,
            stdout=nothing,
            stderr=(folder / "controller.err").open("ab"),
        )
    sys.stdout.write(f"Submitted batch job {number}\n")


def new_number() -> str:
    """A job's number, by which the script and srun's ranks choose a port: others may have jobs on this machine too."""
    while True:
        number = random.randrange(1, 12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 20_000 + number))
            except OSError:
                continue
            return str(number)


def again(folder: Path) -> list[str]:
    return [sys.executable, "-IS", __file__, str(folder)]


def controller(folder: Path, words: list[str]) -> None:
    """The lives of a job: its script runs on the first node, and once more whenever the job was queued again."""
    job = Job(folder, words[0])
    options = job.facts["options"]
    nodes = int(options.get("nodes", "1").rpartition("-")[2])
    tasks = nodes * int(options.get("ntasks-per-node", "1"))
    output = options.get("output", f"{job.facts['folder']}/slurm-%j.out").replace("%j", job.number)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": job.number,
        "SLURM_JOBID": job.number,
        "SLURM_JOB_NAME": options.get("job-name", "script"),
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"),
        "SLURM_CPUS_ON_NODE": options.get("cpus-per-task", str(os.cpu_count())),
        # The script itself is task 0 of a step of its own.
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
        "SLURMD_NODENAME": "127.0.0.1",
    }
    for life in range(9):
        if life:
            environment["SLURM_RESTART_COUNT"] = str(life)
        append = options.get("open-mode") == "append"
        with Path(output).open("ab" if append else "wb") as file:
            script = subprocess.Popen(
                ["bash", str(folder / f"{job.number}.sbatch")], cwd=job.facts["folder"], env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
            job.set(state="RUNNING", script=script.pid, tasks=[])
            code = script.wait()
        job = Job(folder, job.number)
        job.set(lives=[*job.facts["lives"], code])
        if not job.facts.pop("requeue", False):
            break
        job.set(state="PENDING")
    job.set(state="COMPLETED" if code == 0 else "FAILED")


def srun(folder: Path, words: list[str]) -> None:
    """Start a step's tasks, each with what Slurm tells it; the highest of their exit codes is srun's own."""
    options, command = options_of("srun", SRUN, words)
    nodes = int(options.get("nodes") or os.environ.get("SLURM_NNODES", "1"))
    per_node = int(options.get("ntasks-per-node") or int(options.get("ntasks", nodes)) // nodes)
    number = os.environ.get("SLURM_JOB_ID") or new_number()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **task_variables(number, rank, nodes, per_node)},
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED),
            start_new_session=True,
        )
        for rank in range(nodes * per_node)
    ]
    for forwarded in FORWARDED:
        signal.signal(forwarded, lambda number, _: signal_step([task.pid for task in tasks], number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if "SLURM_JOB_ID" in os.environ:
        Job(folder, number).set(tasks=[task.pid for task in tasks])
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))


def task_variables(job: str, rank: int, nodes: int, per_node: int) -> dict[str, str]:
    """What Slurm says to a task of a step; without a job around it, srun makes one."""
    size, node = nodes * per_node, rank // per_node
    names = f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1"
    return {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": os.environ.get("SLURM_JOB_NODELIST", names),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(size),
        "SLURM_NPROCS": str(size),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"127.0.0.{node + 1}",
    }


def scontrol(folder: Path, words: list[str]) -> None:
    """The two that a batch script needs: the names of nodes, and another life of the job."""
    if words[:2] == ["show", "hostnames"]:
        name, _, numbers = words[2].rstrip("]").partition("[")
        first, _, last = numbers.partition("-")
        names = [f"{name}{n}" for n in range(int(first), int(last or first) + 1)] if numbers else [name]
        sys.stdout.write("".join(f"{one}\n" for one in names))
    elif words[:1] == ["requeue"]:
        job = Job(folder, words[1])
        if "requeue" not in job.facts["options"]:
            refuse("scontrol", "Requested operation is presently disabled for job")
        job.set(requeue=True)
        os.kill(job.facts["script"], signal.SIGTERM)  # a running job is ended first
    else:
        refuse("scontrol", f"invalid keyword: {words}")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "controller": controller}[sys.argv[2]](
        Path(sys.argv[1]), sys.argv[3:]
    )
