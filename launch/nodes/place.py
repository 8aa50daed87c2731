"""Places where a job can run, by name: each says what it would write and run, and does so."""

import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from launch.nodes.job import Job
from launch.nodes.options import PlaceOptions
from vlm.ends.end import StoppedError
from vlm.errors import UserError, reason
from vlm.paths import output_folder, write_output
from vlm.registry import Registry


class Place(ABC):
    """One way of starting a job's ranks. `takes` are the fields of `PlaceOptions` that mean something here.

    What is wrong with a job or an option here raises UserError when the place is made.
    """

    takes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, job: Job, options: PlaceOptions) -> None:
        self.job = job
        self.options = options

    @abstractmethod
    def shown(self) -> str:
        """All that `start` would write and run, to the letter."""

    @abstractmethod
    def start(self) -> None:
        """Start the job. Raises UserError where what it takes is not there, or refuses."""


class Written(NamedTuple):
    """A file that a place writes."""

    path: Path
    text: str
    is_program: bool = False


class SchedulerPlace(Place):
    """A place that is another system's: files are written beside the run directory, and a command hands them over."""

    @abstractmethod
    def files(self) -> list[Written]:
        """The files, of which the last is handed over."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command that hands them over, without a shell."""

    @abstractmethod
    def command_words(self) -> str:
        """The same as a line for a shell."""

    def shown(self) -> str:  # noqa: D102
        parts = [f"{file.text.rstrip()}\n# written to {file.path}\n" for file in self.files()]
        return "\n".join([*parts, f"# then: {self.command_words()}"])

    def programs(self) -> list[str]:
        """What has to be on the PATH here."""
        return [self.command()[0]]

    def start(self) -> None:  # noqa: D102
        files = self.files()
        for file in files:
            output_folder(file.path.parent, "vlm launch", files=[file.path.name])
        if missing := [name for name in self.programs() if shutil.which(name) is None]:
            raise UserError(
                f"{missing[0]} is not on the PATH; start this where it is "
                "(--dry-run prints what would be written and run)"
            )
        for file in files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            write_output(file.path, file.text, "vlm launch")
            if file.is_program:
                file.path.chmod(0o755)
            print(f"written: {file.path}")
        self.run_command()

    def run_command(self) -> None:
        """Run the command to its end. Raises UserError where it fails; it has said why itself."""
        if code := self.code_of_command():
            raise UserError(f"{self.command()[0]} ended with {code}: {self.command_words()}")

    def code_of_command(self) -> int:
        """The exit code of the command, to which a signal is passed on; from a terminal it has Ctrl-C already."""
        command = self.command()
        try:
            process = subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run: {reason(error)}") from None
        try:
            return process.wait()
        except StoppedError as stop:
            if stop.number != signal.SIGINT:
                process.terminate()
            process.wait()
            raise


PLACES: Registry[type[Place]] = Registry("place", Place)
# Imported when it is asked for: the ranks of this node need torch, and a script for others does not.
for _name, _class in {
    "local": "local:Local",
    "slurm": "slurm:Slurm",
    "kubernetes": "kubernetes:Kubernetes",
    "ssh": "ssh:Ssh",
}.items():
    PLACES.register_place(_name, f"launch.nodes.{_class}")
