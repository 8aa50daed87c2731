"""Whether packages go together: what each asks of the others, by its own metadata, and what is known beside that."""

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from platform import python_version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding

_OURS = ("torch", "torchvision", "numpy", "accelerate", "deepspeed", "transformers", "open_clip_torch", "timm")
# What their metadata do not say; each was met.
_KNOWN_BAD: tuple[tuple[Mapping[str, str], str, str], ...] = (
    (
        {"open_clip_torch": ">=3.4"},
        "names are taken from inside open_clip, which each minor version may move",
        "pip install 'open_clip_torch>=3.3,<3.4'",
    ),
    (
        {"deepspeed": ">=0.20"},
        "names are taken from inside DeepSpeed, which each minor version may move",
        "pip install 'deepspeed>=0.19.8,<0.20'",
    ),
    (
        {"accelerate": "<1.12"},
        "DeepSpeed's options are driven by accelerate 1.12 and later",
        "pip install -U 'accelerate>=1.12,<2'",
    ),
    ({"numpy": "<2"}, "arrays are written and read by numpy 2", "pip install -U 'numpy>=2'"),
    ({"torch": "<2.11"}, "FSDP2 and DTensor are used as torch 2.11 has them", "pip install -U 'torch>=2.11,<3'"),
)


@CHECKS.register("versions")
class Versions(Check):
    """Python and packages on each rank: alike everywhere, and each as the others ask for it."""

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        installed = {"python": python_version(), **{name: found for name in _OURS if (found := _version(name))}}
        yield from _alike(place.world.gather_objects(installed))
        yield from unfit(installed)
        try:
            import_module("torchvision")
        except Exception as error:  # whatever a build of another torch raises
            words = f"torchvision cannot be imported: {str(error).splitlines()[0][:150]}"
            yield Finding("versions", "fail", words, "install torch and torchvision together, of one build")
        yield Finding("versions", "ok", ", ".join(f"{name} {found}" for name, found in installed.items()))


def unfit(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Findings on packages that do not go together."""
    for name in installed:
        for asked in _requirements(name):
            found = installed.get(asked.name.replace("-", "_")) or _version(asked.name)
            if found is not None and not asked.specifier.contains(found, prereleases=True):
                words = f"{name} {installed[name]} asks for {asked.name}{asked.specifier}, and {found} is here"
                yield Finding("versions", "fail", words, f"pip install '{asked.name}{asked.specifier}'")
    for pair, why, fix in _KNOWN_BAD:
        if all(
            name in installed and Requirement(f"x{bad}").specifier.contains(installed[name], prereleases=True)
            for name, bad in pair.items()
        ):
            words = " with ".join(f"{name} {installed[name]}" for name in pair)
            yield Finding("versions", "fail", f"{words}: {why}", fix)


def _alike(everywhere: list[dict[str, str]]) -> Iterator[Finding]:
    first = everywhere[0]
    for rank, other in enumerate(everywhere):
        different = [name for name in first | other if first.get(name) != other.get(name)]
        if different:
            name = different[0]
            words = f"rank {rank} has {name} {other.get(name, 'none')}, rank 0 {first.get(name, 'none')}"
            yield Finding("versions", "fail", words, "the same environment on every machine")


def _requirements(name: str) -> Iterator[Requirement]:
    try:
        written = requires(name) or []
    except PackageNotFoundError:
        return
    for line in written:
        try:
            asked = Requirement(line)
        except InvalidRequirement:
            continue
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            yield asked


def _version(name: str) -> str | None:
    try:
        found = version(name)
    except PackageNotFoundError:
        return None
    return str(Version(found))
