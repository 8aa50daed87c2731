"""The list of all benchmarks by topic, and the way to start one of them by its name."""

import ast
import os
import sys
from functools import cache
from pathlib import Path

from vlm.errors import nearest

_ROOT = Path(__file__).resolve().parent


def topics() -> list[str]:
    """Names of the folders that hold benchmarks."""
    return sorted(path.parent.name for path in _ROOT.glob("*/__main__.py"))


@cache
def scripts(topic: str) -> dict[str, str]:
    """The first line of the docstring of each of a topic's scripts, which are its modules that have a `main`."""
    first_lines = {}
    for path in sorted((_ROOT / topic).glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            first_lines[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return first_lines


def start(topic: str) -> None:
    """Put the script that the command line names in this process's place, with its arguments; or list them all."""
    known, words = scripts(topic), sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -P -m benchmarks.{topic} SCRIPT [ARGUMENTS]\n\n{listing(topic)}")
    elif words[0] in known:
        os.execv(sys.executable, [sys.executable, "-P", "-m", f"benchmarks.{topic}.{words[0]}", *words[1:]])
    else:
        sys.stderr.write(f"benchmarks.{topic}: {words[0]}: no such script; {nearest(words[0], known)}\n")
        sys.exit(2)


def listing(topic: str) -> str:
    """A line a script: how it is started, and what it measures."""
    return "\n".join(f"    {name:<16} {first_line}" for name, first_line in scripts(topic).items())
