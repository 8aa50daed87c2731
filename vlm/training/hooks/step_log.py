"""The lines of a run's log: loss, terms, rates and fractions of the data, every so many steps."""

import torch

from vlm.batch import Batch, Images
from vlm.distributed.world import World
from vlm.training.clock import Clock
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.hooks.guard import LEFT_OUT, Guard
from vlm.training.hooks.ledger import Ledger
from vlm.training.recorder import Recorder

FIGURES = ("loss", "logit_scale", "lr", "grad_norm", "samples_per_second", "data_wait", LEFT_OUT)
"""The figures of every line, beside those of the terms and of the data."""


class StepLog(Hook):
    """Writes a line after the first step, after every `every_steps`, and after the last."""

    def __init__(
        self, recorder: Recorder, world: World, clock: Clock, ledger: Ledger, guard: Guard, every_steps: int
    ) -> None:
        self._recorder = recorder
        self._world = world
        self._clock = clock
        self._ledger = ledger
        self._guard = guard
        self._every_steps = every_steps

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        is_due = event.step == 1 or event.step % self._every_steps == 0 or event.is_last
        if is_due and not event.result.left_out:
            self._write(event)

    def _write(self, event: StepEvent) -> None:
        output = event.result.loss_output
        local = torch.stack([output.loss, *output.terms.values()]).double()
        loss, *terms = (self._world.sum(local) / self._world.size).tolist()
        self._ledger.flush(event.step)
        rate, wait = self._clock.lap(event.step)
        figures = {
            "loss": loss,
            **dict(zip(output.terms, terms, strict=True)),
            "logit_scale": output.outputs["logit_scale"].item(),
            "lr": event.lr,
            "grad_norm": event.result.grad_norm,
            "samples_per_second": rate,
            "data_wait": wait,
            LEFT_OUT: self._guard.left_out.total,
            **self._ledger.fractions(),
            **_scheduled(event.batch),
        }
        skipped = f"  skipped {self._ledger.num_skipped}" if self._ledger.num_skipped else ""
        self._recorder.show(event.step, f"loss {loss:.4f}  {rate:.0f} samples/s{skipped}")
        self._recorder.write(event.step, figures)


def _scheduled(batch: Batch) -> dict[str, float]:
    """The images that a step was shown, where a schedule says which."""
    images = batch.parts.get("image")
    if not isinstance(images, Images) or images.patch_dropout is None:
        return {}
    return {"patch_dropout": images.patch_dropout}
