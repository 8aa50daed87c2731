"""Every import is asked for, and nothing else; every name taken from another package is there."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from launch.doctor.versions import _KNOWN_BAD

PROJECT = Path(__file__).parents[1]
OURS = {"vlm", "data", "eval", "launch"}
# Asked for without an import here: what it serves.
UNIMPORTED = {"tensorboard": "accelerate's tracker that recipes begin with"}
# Imported without being asked for: who brings it.
BROUGHT = {"triton": "torch, where there are GPUs", "ray": "the extra of its name", "bitsandbytes": "the extra 8bit"}
# Packages whose inner modules we use, which no promise of theirs covers.
INNER = {"open_clip_torch", "deepspeed", "accelerate", "transformers", "timm", "torch", "typer", "webdataset"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in sorted(OURS):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports() -> frozenset[tuple[Path, str, str | None]]:
    """Every module of others that is imported, and the name taken from it."""
    return frozenset(_imports())


def _imports() -> Iterator[tuple[Path, str, str | None]]:
    found: list[tuple[str, str | None]]
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [(node.module, alias.name) for alias in node.names]
            elif (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            ):
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                found = [(str(word), None) for word in words]
            else:
                continue
            for module, name in found:
                root = module.partition(".")[0]
                if root not in OURS and root not in sys.stdlib_module_names:
                    yield path, module, name


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def requirements() -> dict[str, str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = [re.fullmatch(r"([A-Za-z0-9._-]+)(\[[^]]*\])?(.*)", line) for line in project["dependencies"]]
    return {plain(part[1]): part[3] for part in parts if part is not None}


def test_requirements_are_the_imports() -> None:
    distributions = packages_distributions()
    roots = {module.partition(".")[0] for _, module, _ in imports()} - BROUGHT.keys()
    wanted = {plain(distributions[root][0]) for root in roots}
    assert wanted == requirements().keys() - UNIMPORTED.keys()


def test_packages_whose_inner_names_are_used_have_an_upper_bound() -> None:
    asked = requirements()
    assert [name for name in sorted(INNER) if "<" not in asked[name]] == []
    private = {
        module.partition(".")[0]
        for _, module, name in imports()
        if any(part.startswith("_") for part in [*module.split("."), name or ""])
    }
    distributions = packages_distributions()
    assert {plain(distributions[root][0]) for root in private} <= INNER


def test_lower_bounds_are_the_versions_that_make_test_lowest_installs() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (PROJECT / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {pin.name: pin.specifier for pin in (Requirement(line) for line in lines if not line.startswith("#"))}
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        asked = Requirement(line)
        lowest = [part.version for part in asked.specifier if part.operator in (">=", "==")]
        assert lowest, f"{line} has no lower bound"
        assert pinned[canonicalize_name(asked.name)].contains(lowest[0]), line


def test_remedies_of_the_doctor_ask_for_what_the_project_does() -> None:
    asked = requirements()
    for _, _, remedy in _KNOWN_BAD:
        wanted = Requirement(remedy.split("'")[1])
        assert wanted.specifier == SpecifierSet(asked[plain(wanted.name)]), remedy


@pytest.mark.parametrize("package", sorted({module.partition(".")[0] for _, module, _ in imports()} - BROUGHT.keys()))
def test_every_name_taken_from_a_package_is_there(package: str) -> None:
    for path, module, name in sorted(imports(), key=str):
        if module.partition(".")[0] == package:
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")  # or else it says which name is gone
            assert path.exists()


def test_every_attribute_taken_from_a_module_is_there() -> None:
    """`dist.set_timeout` of `import torch.distributed as dist`, which no import line shows."""
    missing = []
    for path, tree in sources():
        modules = dict(_modules_by_alias(tree))
        for node in ast.walk(tree):
            names = _dotted(node)
            if len(names) > 1 and names[0] in modules:
                found: Any = modules[names[0]]
                for name in names[1:]:
                    if not isinstance(found, ModuleType):
                        break
                    if not hasattr(found, name):
                        missing.append(f"{path.relative_to(PROJECT)}: {found.__name__}.{name}")
                        break
                    found = getattr(found, name)
    assert missing == []


def _modules_by_alias(tree: ast.Module) -> Iterator[tuple[str, ModuleType]]:
    """Modules of others that a file imports whole, by the names that it calls them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                if root not in OURS | BROUGHT.keys() and root not in sys.stdlib_module_names:
                    importlib.import_module(alias.name)
                    yield alias.asname or root, sys.modules[alias.name if alias.asname else root]


def _dotted(node: ast.AST) -> list[str]:
    """The names of `a.b.c`, or none."""
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


def test_attributes_inside_other_packages_are_there() -> None:
    """Those that no import line shows."""
    import deepspeed
    import torch
    import typer
    from transformers.integrations import deepspeed as hf_deepspeed

    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    assert callable(hf_deepspeed.unset_hf_deepspeed_config)
    assert hasattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref")
    assert callable(torch._foreach_lerp_)
    assert callable(torch.distributed.ProcessGroup.set_timeout)
    assert typer.BadParameter.__mro__[1].__name__ == "UsageError"
