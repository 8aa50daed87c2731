"""The packages that the parts import, and those that these ask for: what a machine needs beside torch."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What the parts import, and the run that one of them starts.
_MODULES = (
    "benchmarks.gpu.checks",
    "benchmarks.gpu.steps",
    "benchmarks.gpu.losses",
    "benchmarks.gpu.machine",
    "launch.main",
    "launch.train",
    "eval.report",
    "data.loading.crew",
    "vlm.training.engines.ddp",
    "matplotlib.pyplot",
)
# A build of torch brings them, or goes with one of them alone.
_WITH_TORCH = frozenset({"torch", "torchvision", "triton"})
_OURS = frozenset({"vlm", "data", "eval", "launch", "benchmarks", "tests"})


def needed() -> list[dict[str, Any]]:
    """Name, version and bytes as installed of each package, by name; without torch and what it asks for itself."""
    for name in _MODULES:
        import_module(name)
    found = sorted(closure(_imported(), requirements_of) - closure(_WITH_TORCH, requirements_of) - _OURS)
    return [{"name": name, "version": version(name), "bytes": _size(name)} for name in found]


def closure(names: Iterable[str], asked: Any) -> set[str]:
    """The packages of these names and all that they ask for, in turn."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += asked(name)
    return found


def requirements_of(name: str) -> Sequence[str]:
    """The installed packages that one asks for, without its extras."""
    try:
        asked = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return []
    wanted = [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [canonicalize_name(one) for one in wanted if _is_installed(one)]


def _imported() -> set[str]:
    known: Mapping[str, Sequence[str]] = packages_distributions()
    roots = {name.partition(".")[0] for name in sys.modules} - _OURS  # whose names others may have taken too
    return {canonicalize_name(owner) for root in roots for owner in known.get(root, ())}


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _size(name: str) -> int:
    return sum(file.size or 0 for file in distribution(name).files or [])
