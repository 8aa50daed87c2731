"""The modules that spawned ranks start with: imported once, and checked at run time like the tests' own."""

import atexit
import gc

gc.disable()  # there is no garbage among what is imported, and looking for it takes a fifth of the time

from tests.runtime_types import activate  # noqa: E402

activate()

import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402  # DeepSpeed's start imports it, and it Inductor
import pytest  # noqa: E402
import simplejpeg  # noqa: E402

import launch.train  # noqa: E402
import vlm.training.engines.ddp  # noqa: E402
import vlm.training.engines.fsdp  # noqa: E402
import vlm.training.engines.zero  # noqa: E402

# Asked of the compiler when it is first read, in every rank otherwise.
COMPATIBLE_OPS = deepspeed.ops.__compatible_ops__

# Else each rank that collects garbage, as ZeRO-3's start does, goes through a million objects and copies their pages.
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # libraries count at the end of the process what is left

__all__ = ["deepspeed", "launch", "pytest", "simplejpeg", "vlm"]
