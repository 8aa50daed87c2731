"""The geometry of a step's embeddings, every so many steps."""

from vlm.distributed.world import World
from vlm.geometry.telemetry import PairSample, observe, sample_pairs
from vlm.similarity.exchange import Exchange
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.recorder import Recorder


class GeometryTelemetry(Hook):
    """Measures some pairs of the global batch on rank 0, and writes the figures as `geometry/NAME`."""

    def __init__(self, recorder: Recorder, world: World, every_steps: int, sample: int) -> None:
        self._recorder = recorder
        self._exchange = Exchange(world)
        self._every_steps = every_steps
        self._sample = sample

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        if event.step % self._every_steps == 0 and not event.result.left_out:
            self.observe(event)

    def observe(self, event: StepEvent) -> None:
        """Measure and write the geometry of the step's pairs. Collective."""
        outputs = event.result.loss_output.outputs
        ranks, _ = self._exchange.count(len(event.batch))
        local = PairSample(outputs["image"], outputs["text"], event.batch.labels)
        pairs = sample_pairs(local, ranks, self._sample, event.step)
        is_main = self._exchange.world.is_main
        figures = observe(pairs, outputs["logit_scale"].item()) if is_main else {}
        self._recorder.write(event.step, {f"geometry/{name}": value for name, value in figures.items()})
