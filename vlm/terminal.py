"""Lines for a terminal, whose words come from shards and tables: shown as they are, and never obeyed."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters but the line end, marks of direction and of bytes' order, line and paragraph separators, and halves
# of surrogate pairs (as which Python keeps bytes that are not UTF-8), which no stream takes.
_NOT_SHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with escapes in place of what moves the cursor, turns letters, or cannot be written: `\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return _NOT_SHOWN.sub(lambda match: _escaped(ord(match[0])), text)


def one_line(text: str) -> str:
    """The same, with a blank for each line end."""
    return printable(" ".join(text.splitlines()) if "\n" in text else text)


class Terminal(Console):
    """rich's console for words of any origin: no markup, no `:emoji:`, no colours of its own, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it is to be shown; every string that is printed, also in tables, comes through here."""
        return super().render_str(printable(text), **options)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
