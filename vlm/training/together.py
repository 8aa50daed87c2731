"""The ranks of a launch, joined for a while: whatever ends one is told by all, before the process group goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.ends.watch import Watch, watching
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import start_accelerator

# A healthy rank may keep the others waiting in a collective, while it writes a report or reads its data: that one is
# lost is seen by its heartbeat. The group's own limit is for what no heartbeat shows.
_COLLECTIVE = timedelta(minutes=30)


@contextmanager
def ranks_together(
    settings: EngineSettings,
    *,
    patience: Patience,
    trackers: tuple[str, ...] = (),
    run: Path | None = None,
) -> Iterator[tuple[Accelerator, Watch]]:
    """The accelerator of the launched ranks, and the watch over them and this process.

    A rank that is silent for longer than `patience` is given up. An exception that leaves the block is told on this
    rank and on the others before it goes on its way.
    """
    with watching() as watch:
        accelerator = None
        try:
            accelerator = start_accelerator(settings, trackers=trackers, run=run, patience=patience.seconds)
            _watch_each_other(watch, World.current(accelerator.device), patience)
            yield accelerator, watch
            watch.leave()
        except BaseException as error:
            watch.report(error)
            raise
        finally:
            if accelerator is not None:
                accelerator.end_training()


def _watch_each_other(watch: Watch, world: World, patience: Patience) -> None:
    if dist.group.WORLD is not None and world.size > 1:
        dist.group.WORLD.set_timeout(max(_COLLECTIVE, 2 * timedelta(seconds=patience.seconds)))
    lost = watch.join(world, patience)
    if lost and world.is_main:
        watch.teller.notice(
            f"{lost} of {world.size} ranks cannot reach rank 0 by TCP: a lost rank is noticed late, and a signal ends "
            "the run at once"
        )
