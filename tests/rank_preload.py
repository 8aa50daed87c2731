"""The modules that spawned ranks start with: imported once, and checked at run time like the tests' own."""

from tests.runtime_types import activate

activate()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402  # DeepSpeed's start imports it, and it Inductor

import launch.train  # noqa: E402
import vlm.training.engines.fsdp  # noqa: E402
import vlm.training.engines.zero  # noqa: E402

__all__ = ["deepspeed", "launch", "vlm"]
