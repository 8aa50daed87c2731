"""Block and tile sizes far below any batch, so that a small fixture goes through several blocks of everything."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = ("vlm.similarity.", "vlm.objectives.")
_NOT_A_BLOCK = ("_TRIAL_", "_SAMPLED_")
_SIZES = re.compile(r"_?(\w*_)?(ROWS|COLUMNS|BLOCK|BLOCK_NUMBERS|BLOCK_ENTRIES|BLOCK_ACTIVATIONS)")


def block_sizes() -> dict[tuple[str, str], int]:
    """Every block size of the loaded modules, by module and name; names say which constants are block sizes."""
    return {
        (module, name): value
        for module in sorted(sys.modules)
        if module.startswith(PACKAGES)
        for name, value in vars(sys.modules[module]).items()
        if isinstance(value, int) and _SIZES.fullmatch(name) and not name.startswith(_NOT_A_BLOCK)
    }


@contextmanager
def small_blocks() -> Iterator[None]:
    """In the block, all of them hold two or three rows or columns."""
    found = block_sizes()
    try:
        for (module, name), _ in found.items():
            # Numbers, entries and activations are divided by a row's size, 6 to 11 here.
            small = 20 if name.endswith(("NUMBERS", "ENTRIES", "ACTIVATIONS")) else 3 if "COLUMNS" in name else 2
            setattr(sys.modules[module], name, small)
        yield
    finally:
        for (module, name), size in found.items():
            setattr(sys.modules[module], name, size)
