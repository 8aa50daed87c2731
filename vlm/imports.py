"""Heavy imports, made as fast as they can be: a command says in a moment what it does, and begins soon after."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports(*, timm: bool = True) -> Iterator[None]:
    """Import within the block without what takes time for nothing; `timm` says that it will be among the imports.

    There is no garbage among what is imported, and looking for it takes a fifth of the time. What is there then stays:
    later collections, and forked processes, leave it alone. timm imports wandb, for its own training's log alone.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        if timm and "timm" not in sys.modules and "wandb" not in sys.modules:
            _import_timm()
        yield
    finally:
        if was_on:
            gc.freeze()
            atexit.register(gc.unfreeze)  # libraries count at the end of the process what is left
            gc.enable()


def _import_timm() -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment] # Python's way to say that there is none
    try:
        import timm  # noqa: F401
    finally:
        del sys.modules["wandb"]
