"""Packages of vlm import each other one way: their graph has no circle."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def package_of(module: str) -> str:
    """`vlm.model` of `vlm.model.towers`; a module beside the packages is one of its own."""
    return ".".join(module.split(".")[:2])


def imports_between_packages() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for path in (PROJECT / "vlm").rglob("*.py"):
        importer = package_of(".".join(path.relative_to(PROJECT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm."):
                graph[importer].add(package_of(node.module))
    return {package: imported - {package} for package, imported in graph.items()}


def test_no_package_imports_one_that_imports_it() -> None:
    graph = imports_between_packages()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("vlm.checkpoint") < order.index("vlm.model") < order.index("vlm.training")
    assert "vlm.training" not in {
        imported for package in graph if package != "vlm.training" for imported in graph[package]
    }
