"""Stops that a signal asks for: after a step, or between two forwards of an evaluation; on all ranks at the same."""

from typing import NoReturn

import torch

from vlm.activity import activity
from vlm.distributed.world import World
from vlm.ends.end import StoppedError
from vlm.ends.watch import Watch

_AHEAD = 2  # steps from a request to the stop: the host may run ahead of a GPU
_CHECK_EVERY = 8  # forwards


class EvaluationStoppedError(Exception):
    """An evaluation was left, on all ranks, so that the run can be saved and stopped."""


class Stops:
    """Whether the run stops, as all ranks agree: asked once a step, and between the forwards of evaluations.

    Costs nothing until a signal has come. Rank 0 says after which step all stop, and goes on when all the others know
    it: none can finish a step without it. `how_to_go_on` ends the line that tells of the stop.
    """

    def __init__(self, watch: Watch, world: World, how_to_go_on: str = "") -> None:
        self._watch = watch
        self._world = world
        self._how = how_to_go_on
        self._calls = 0
        self.is_stopping = False

    def ask(self, step: int, last: int) -> None:
        """Find out whether all ranks stop after `step` of `last` steps."""
        self.is_stopping = self._is_due(step, last)

    def _is_due(self, step: int, last: int) -> bool:
        watch = self._watch
        if watch.request is None:
            return False
        if self._world.size == 1:
            return True
        if watch.stop_after is None and self._world.is_main and step < last:
            watch.agree_to_stop(min(step + _AHEAD, last))
        return watch.stop_after is not None and step >= watch.stop_after

    def check(self) -> None:
        """Called between the forwards of an evaluation, equally often by every rank. Collective now and then.

        Raises:
            EvaluationStoppedError: a rank was asked to stop; on all ranks.
        """
        self._calls += 1
        activity.touch(activity.slack)
        if self._world.size == 1:
            if self._watch.request is not None:
                self._stop_evaluation()
            return
        if self._calls % _CHECK_EVERY:
            return
        num_requests = torch.tensor([0 if self._watch.request is None else 1], device=self._world.device)
        if self._world.sum(num_requests).item():
            numbers = self._world.gather_objects(self._watch.request)
            self._watch.request = next(number for number in numbers if number is not None)
            self._stop_evaluation()

    def _stop_evaluation(self) -> NoReturn:
        self.is_stopping = True
        raise EvaluationStoppedError

    def stopped(self, step: int) -> StoppedError:
        """The error that ends the run when the checkpoint after `step` is whole."""
        number = self._watch.request
        assert number is not None
        return StoppedError(number, f"step {step} is saved{self._how}", agreed=True)
