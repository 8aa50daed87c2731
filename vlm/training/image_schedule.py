"""Which images the steps of a run train on: how many of their patches are left out, as a function of the step."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import Field

from vlm.batch import Batch
from vlm.config import Config
from vlm.duration import Stretch
from vlm.errors import EveryRankError

KEY = "image_schedule"


class ImageStage(Config):
    """A stage of a run that looks at less of its images: at some of their patches (FLIP: Li et al., 2023)."""

    until: Stretch = Field(
        description='where it ends, from the start of the run: "80%" of it, "2000 steps", "1.2M samples", "2 epochs"'
    )
    patch_dropout: float | None = Field(
        default=None,
        ge=0,
        le=0.99,
        description="share of an image's patches that are left out; null: what the model leaves out by itself",
    )


class TrainedImages(NamedTuple):
    """The images of a step: the share of their patches that is left out; None: as the model says."""

    patch_dropout: float | None = None


@dataclass(frozen=True)
class ImageStages:
    """The images of every step of a run: the stages end before the steps `ends`, ascending, and one more follows."""

    ends: tuple[int, ...] = ()
    images: tuple[TrainedImages, ...] = (TrainedImages(),)

    def at(self, step: int) -> TrainedImages:
        """The images of a step, counted from 0."""
        return self.images[bisect_right(self.ends, step)]

    def shown(self, batch: Batch) -> Batch:
        """The batch as its step is to look at it."""
        return batch.with_patch_dropout(self.at(batch.step).patch_dropout)


def resolved_stages(
    stages: Sequence[ImageStage], own: TrainedImages, *, global_batch: int, num_samples: int, num_steps: int
) -> ImageStages:
    """The stages of a run in steps; `own` are the images that the model trains on by itself.

    Behind the last one follow whole images, to the end of the run. Without any stage all is as the model says.

    Raises:
        EveryRankError: a stage ends behind the run, or before another that stands above it.
    """
    ends = [0]
    for number, stage in enumerate(stages):
        end = stage.until.steps(global_batch, num_samples, num_steps)
        found = f"{KEY}.{number}.until: {stage.until} is step {end:,}"
        if end > num_steps:
            raise EveryRankError(f"{found}, and the run ends after step {num_steps:,}")
        if end <= ends[-1]:
            raise EveryRankError(f"{found}, no later than the end of the stage above it; stages come in their order")
        ends.append(end)
    if not stages:
        return ImageStages()
    images = [TrainedImages(own.patch_dropout if one.patch_dropout is None else one.patch_dropout) for one in stages]
    return ImageStages(tuple(ends[1:]), (*images, TrainedImages(0.0)))
