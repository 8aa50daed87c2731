"""Measurements of this machine, kept in the user's cache folder so that each is made once."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, JsonValue, ValidationError

from vlm.atomic import write_text

_FOLDER = "VLM_CACHE"
_CPU_INFO = Path("/proc/cpuinfo")
_MOST_BYTES = 10**6

Measured = TypeVar("Measured", bound=BaseModel)


def measured_once(
    name: str, of: Mapping[str, JsonValue], kind: type[Measured], measure: Callable[[], Measured]
) -> Measured:
    """The measurement `name` of what `of` describes: as this machine's cache has it, or made now and put there.

    Of several processes that measure at a time the first to end decides for all. A cache that cannot be read or written
    only costs the time of the measurement. The folder is $VLM_CACHE, or vlm below the user's cache folder.
    """
    key = json.dumps({"machine": _machine(), **of}, sort_keys=True)
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = _read(path, key, kind)
    if known is not None:
        return known
    made = measure()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _read(path, key, kind) is None:
            path.unlink(missing_ok=True)  # damaged, or of another key
        _write_first(path, json.dumps({"of": key, "measured": made.model_dump(mode="json")}))
    return _read(path, key, kind) or made


def cache_folder() -> Path:
    """The folder of what this machine measured."""
    named = os.environ.get(_FOLDER)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"


def _read(path: Path, key: str, kind: type[Measured]) -> Measured | None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        stored = json.loads(path.read_text())
        return kind.model_validate(stored["measured"]) if stored["of"] == key else None
    except (OSError, ValueError, TypeError, KeyError, ValidationError):
        return None


def _write_first(path: Path, text: str) -> None:
    """Write a file that another process may have written meanwhile, whose content then stays."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    write_text(aside, text)
    try:
        os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@cache
def _machine() -> dict[str, JsonValue]:
    """What a measurement depends on beside what is measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
