"""Under pytest every annotated shape and type of our own code is checked at run time."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

from tests.runtime_types import activate


def pytest_configure(config: pytest.Config) -> None:
    """Check from the first test module on; a process that only hands out tests to others imports none.

    What the tests measure of this machine is kept for all their processes, and not in the user's cache.
    """
    if "VLM_CACHE" not in os.environ:
        os.environ["VLM_CACHE"] = tempfile.mkdtemp(prefix="vlm-cache-")
        atexit.register(shutil.rmtree, os.environ["VLM_CACHE"], ignore_errors=True)
    if getattr(config.option, "dist", "no") == "no":
        gc.disable()
        activate()


def pytest_collection_finish() -> None:
    """Have garbage looked for among what tests make, and not among a million objects of modules that stay."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # libraries count at the end of the process what is left
