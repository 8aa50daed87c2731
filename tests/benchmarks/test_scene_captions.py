"""The reading of a generated caption of a scene: number, colour and shape of its main group."""

import pytest

from benchmarks.captions.scenes import names_main_group

COUNTS = {"red circle": 2, "blue star": 3}


@pytest.mark.parametrize(
    ("caption", "counts", "expected"),
    [
        ("two red circles above three blue stars", COUNTS, True),
        ("there are 3 tiny blue stars", COUNTS, True),
        ("three medium-sized blue stars on a white background", COUNTS, True),
        ("two red circles and four blue stars", COUNTS, False),
        ("two red circles and three stars", COUNTS, False),
        ("thirty-three blue stars", COUNTS, False),
        ("three blue star", COUNTS, False),
        ("a large red cross in the middle", {"red cross": 1}, True),
        ("one red cross", {"red cross": 1}, True),
        ("an image of two red crosses", {"red cross": 2}, True),
        ("two red crosses", {"red cross": 1}, False),
        ("a red ring", {"red ring": 1, "blue ring": 1}, True),
        ("", COUNTS, False),
    ],
)
def test_the_main_group_is_named(caption: str, counts: dict[str, int], expected: bool) -> None:
    assert names_main_group(caption, counts) is expected
