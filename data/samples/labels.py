"""Class numbers, as shards and tables write them."""

from typing import Any, Final

from data.samples.bad_sample import BadSampleError

LARGEST: Final = 2**63 - 1
"""The largest class number: labels travel as 64-bit integers."""

_MOST_DIGITS = 19


def class_number(label: Any, what: str = "label") -> int:
    """The label (bytes, text or a number) as a whole number from 0 to `LARGEST`; `what` is its name in a message.

    Raises:
        BadSampleError: it is none.
    """
    text = label.decode("utf-8-sig", "replace") if isinstance(label, bytes) else str(label)
    if isinstance(label, float) and label.is_integer():
        text = str(int(label))
    digits = text.strip().lstrip("0") or text.strip()[-1:]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS and int(digits) <= LARGEST):
        raise BadSampleError(f"its {what} is no class number but {label!r:.40}")
    return int(digits)
