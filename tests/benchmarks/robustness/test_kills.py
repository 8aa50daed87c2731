"""Moments at which the benchmark of kills ends a run: they are named as text, which no checker of types follows."""

import importlib

import pytest

from benchmarks.robustness.kills import MOMENTS


@pytest.mark.parametrize(("module", "function"), MOMENTS.values(), ids=MOMENTS)
def test_a_moment_is_the_call_of_a_function_that_is_there(module: str, function: str) -> None:
    assert callable(getattr(importlib.import_module(module), function))
