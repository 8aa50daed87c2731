"""How a command ends: whatever it is, one line on standard error and an exit code; and how to go on after it."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vlm.ends.watch import watching

# What gloo, NCCL and the profiler would write beside our own line; a level that the user sets stays.
_LOG_LEVELS = {"TORCH_CPP_LOG_LEVEL": "FATAL", "KINETO_LOG_LEVEL": "99"}


def run_to_its_end(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave with its exit code: 2 a user's mistake, 1 another failure, 130 or 143 a signal."""
    for name, level in _LOG_LEVELS.items():
        os.environ.setdefault(name, level)
    with watching() as watch:
        try:
            command()
            code = 0
        except SystemExit:
            raise
        except BaseException as error:
            code = watch.report(error)
    sys.exit(code)


def how_to_go_on() -> str:
    """The end of a line that tells of a stop: the command that goes on, where this process was started by one."""
    program, *arguments = sys.argv
    if "vlm" not in (Path(program).name, Path(program).parent.name) or not arguments:
        return "; the same run goes on with resume='auto'"
    if arguments[0] == "train":
        arguments = [*_without_resume(arguments), "--resume", "auto"]
    return f"; go on by: {shlex.join(['vlm', *arguments])}"


def _without_resume(arguments: Sequence[str]) -> list[str]:
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--resume":
            next(left, None)
        elif not argument.startswith("--resume="):
            others.append(argument)
    return others


def lost_words(saved: Sequence[int]) -> str:
    """Words on what an end at once loses, the checkpoints that are there being of these steps."""
    if not saved:
        return "; no checkpoint was written, so all of it is lost"
    return f"; what came after step {max(saved)} is lost{how_to_go_on()}"
