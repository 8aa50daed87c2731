"""Words of any origin are shown on a terminal as they are, and never obeyed."""

import io

import pytest
from rich.table import Table

from vlm.terminal import Terminal, one_line, printable
from vlm.training.progress import Bar, Lines

HOSTILE = "a[/b] [bold]b[/bold] :smile: \x1b[31mred\x9b0m\x07 \u202eturned \udcff \ud800 \x00"
SHOWN = r"a[/b] [bold]b[/bold] :smile: \x1b[31mred\x9b0m\x07 \u202eturned \xff \ud800 \x00"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert one_line(f"one\r\n{HOSTILE}\u2028two") == f"one {SHOWN} two"


@pytest.mark.parametrize("text", ["plain", "Ünïcödé 木\u3000 \N{GRINNING FACE} \u200d", "two\nlines", "C:\\x1b"])
def test_everything_else_stays(text: str) -> None:
    assert printable(text) == text


def test_lines_tables_and_titles_come_out_as_they_went_in() -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=400, force_terminal=True, color_system=None)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print(HOSTILE)
    assert file.getvalue().count(SHOWN) == 4
    assert "\x1b[31m" not in file.getvalue()


@pytest.mark.parametrize("display", [Lines, Bar])
def test_keys_of_samples_in_lines_of_a_run_are_harmless(display: type[Lines] | type[Bar]) -> None:
    file = io.StringIO()
    progress = display(Terminal(file=file, width=400, color_system=None), 0, 10, 5.0)
    progress.update(10, f"skipped {HOSTILE}")
    progress.say(f"left out: {HOSTILE}\nand more")
    progress.close()
    assert f"left out: {SHOWN} and more" in file.getvalue()
    assert f"skipped {SHOWN}" in file.getvalue()
    assert "\x1b[31m" not in file.getvalue()
