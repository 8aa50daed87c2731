"""JSON out of shards and tables: no deeper than all that is done with it can follow."""

import json
from typing import Any, Final

MOST_LEVELS: Final = 100


def parse_json(stored: bytes) -> Any:
    """The value that JSON describes.

    Raises:
        ValueError: it is no JSON, or nested more than `MOST_LEVELS` deep: what compares, copies and writes values again
            takes a level of the interpreter's stack for each of theirs.
    """
    try:
        value = json.loads(stored)
    except RecursionError:
        raise _too_deep() from None
    if stored.count(b"[") + stored.count(b"{") > MOST_LEVELS:  # few texts have so many: the others cost nothing
        _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [inner for one in level for inner in _within(one)]
        if not level:
            return
    raise _too_deep()


def _within(value: Any) -> list[Any]:
    inner_values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in inner_values if isinstance(inner, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MOST_LEVELS} deep")
