"""The checks by name, in the order in which they run."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.pairs import check_kernels, check_tiles
from benchmarks.gpu.resume import check_resume
from benchmarks.gpu.setting import Line, Setting, noted_warnings
from benchmarks.gpu.towers import check_bf16, check_towers
from benchmarks.gpu.transfers import check_copies, check_group

CHECKS: Mapping[str, Callable[[Setting], list[Line]]] = {
    "towers": check_towers,
    "tiles": check_tiles,
    "kernels": check_kernels,
    "bf16": check_bf16,
    "group": check_group,
    "copies": check_copies,
    "resume": check_resume,
}


def run_check(device: str, quick: bool, name: str) -> dict[str, Any]:
    """What a check compared, as plain values."""
    with noted_warnings() as notes:
        lines = CHECKS[name](Setting(device, quick))
    return {"lines": [{**line._asdict(), "passed": line.passed} for line in lines], "notes": notes}
