"""The deletion of old checkpoints beside training: on many disks it takes as long as the copy of a new one."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from vlm.checkpoint.folder import delete
from vlm.distributed.world import World


class Deletion:
    """Deletes in a thread of rank 0 what was put away. All ranks call its methods together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._thread: threading.Thread | None = None
        self._is_open = False

    def begin(self, put_away: Sequence[Path]) -> None:
        """Delete folders of rank 0, when those before are gone; a kill leaves them to the next start."""
        self.wait()
        self._is_open = True
        if put_away:
            self._thread = threading.Thread(target=_delete, args=(put_away,), name="deletion", daemon=True)
            self._thread.start()

    def has_ended(self) -> bool:
        """Whether one that was begun is over, said once. Collective while one is open."""
        if not self._is_open:
            return False
        goes_on = torch.tensor([self._thread is not None and self._thread.is_alive()], device=self._world.device)
        self._is_open = bool(self._world.sum(goes_on.float()).item())
        return not self._is_open

    def wait(self) -> None:
        """Wait, on rank 0, until all is deleted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _delete(put_away: Sequence[Path]) -> None:
    with suppress(OSError):  # what stays is in nobody's way but for its room, of which a run tells
        delete(put_away)
