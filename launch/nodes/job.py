"""What is launched: one recipe, on how many nodes, with how many ranks each, and what follows when some are lost."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from vlm.errors import UserError
from vlm.paths import MAX_NAME, local_path, shown

_MOST_NODES = 100_000
_NODES = re.compile(r"(\d{1,6})(?::(\d{1,6}))?")


class Nodes(NamedTuple):
    """How many nodes a run begins with at most, and goes on with at least."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        """The numbers of `4`, or of `2:4`. Raises UserError."""
        match = _NODES.fullmatch(text)
        nodes = cls(int(match[1]), int(match[2] or match[1])) if match else cls(0, 0)
        if not 1 <= nodes.least <= nodes.most <= _MOST_NODES:
            raise UserError(
                f"--nodes: {shown(text)} is no number of nodes; write 4, or 2:4 for at least 2 and at most 4"
            )
        return nodes

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on when some are lost."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)


@dataclass(frozen=True)
class Job:
    """One run as it is launched.

    `flags` are options of `vlm train`; `ranks` is their number a node; `restarts` how often a node starts its ranks
    again; `wait` the seconds that a lost node is waited for before the others go on; `grace` the seconds that ranks
    have to save when they are to stop.
    """

    recipe: str
    overrides: tuple[str, ...]
    flags: tuple[str, ...]
    nodes: Nodes
    ranks: int
    run: Path
    name: str
    program: tuple[str, ...]
    restarts: int = 100
    wait: int = 30
    grace: int = 120

    @property
    def most_ranks(self) -> int:
        """The ranks when all nodes are there."""
        return self.nodes.most * self.ranks

    def train_command(self) -> list[str]:
        """The command of each rank: a new run, or the newest checkpoint of the one that is there."""
        return [*self.program, "train", self.recipe, *self.overrides, *self.flags, "--resume", "auto"]

    def node_command(self, program: Sequence[str] | None = None) -> list[str]:
        """The command that starts one node's ranks; where the nodes meet is to be added, as `--meet HOST:PORT`."""
        return [
            *(self.program if program is None else program),
            "launch",
            self.recipe,
            *self.overrides,
            *self.flags,
            *("--on", "local", "--nodes", str(self.nodes), "--gpus-per-node", str(self.ranks), "--name", self.name),
            *("--max-restarts", str(self.restarts), "--wait", str(self.wait), "--grace", str(self.grace)),
        ]

    def with_recipe(self, recipe: str) -> "Job":
        """The same job by another name of its recipe's file."""
        return replace(self, recipe=recipe)

    def with_overrides(self, overrides: Sequence[str]) -> "Job":
        """The same job with more changes of its recipe."""
        return replace(self, overrides=(*self.overrides, *overrides))

    def without_overrides(self) -> "Job":
        """The same job by a recipe that has them in it."""
        return replace(self, overrides=())


def job_name(text: str | None, run: Path) -> str:
    """A name for schedulers, as all of them take it: small letters, digits and `-`; by default that of the run.

    Raises:
        UserError: a name was given that is none.
    """
    if text is None:
        return re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40].strip("-") or "vlm"
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise UserError(f"--name: {shown(text)} is no name: at most 40 of a-z, 0-9 and '-', a letter first")
    return text


def program_here(text: str | None) -> tuple[str, ...]:
    """The words that start `vlm`: as it was said, or as this process was started.

    Raises:
        UserError: nothing on the path is called vlm.
    """
    if text is not None:
        try:
            words = tuple(shlex.split(text))
        except ValueError:
            words = ()
        if not words or not text.isprintable():
            raise UserError(f"--program: {shown(text)} is no command")
        return words
    started = Path(sys.argv[0])
    if started.name == "vlm" and started.is_file():
        return (str(started.absolute()),)
    if started.name == "__main__.py" and started.parent.name == "vlm":
        return (sys.executable, "-P", "-m", "vlm")
    found = shutil.which("vlm")
    if found is None:
        raise UserError("no program called vlm is on the PATH; --program says how it is started")
    return (found,)


def beside(run: Path, suffix: str) -> Path:
    """The path of a file beside the run directory, which holds nothing but the run."""
    return run.parent / f"{run.name[:MAX_NAME]}{suffix}"


def absolute_recipe(recipe: str) -> str:
    """A recipe as nodes find it that share this machine's disks: a file by its whole path, or a name that ships."""
    path = local_path(recipe, "recipe")
    return os.path.abspath(path) if path.is_file() else recipe
