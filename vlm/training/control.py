"""The length of a run, its clock, and its stops: shared by the trainer and the hooks that take their time."""

from dataclasses import dataclass

from vlm.ends.stops import Stops
from vlm.training.clock import Clock


@dataclass(frozen=True)
class RunControl:
    """Over how many steps a run goes, whether a signal ends it before, and the time that its steps take."""

    num_steps: int
    clock: Clock
    stops: Stops
