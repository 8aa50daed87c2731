"""The best and worst retrievals of runs, as pictures inside the page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.samples.bad_sample import BadSampleError
from eval.examples import EXAMPLES_FILE, picture
from eval.figures import four_digits
from eval.run_record import RunRecord
from vlm.paths import below
from vlm.training.run_files import EXAMPLES

_MOST_CAPTIONS = 2
_KINDS = {"best": "Best retrievals", "worst": "Worst retrievals"}


@dataclass(frozen=True)
class Card:
    """One image (None: it is lost), its true captions, and what it retrieved: text, whether it is its own, cosine."""

    picture: str | None
    rank: str
    is_first: bool
    captions: list[str]
    num_more: int
    retrieved: list[tuple[str, bool, str]]


@dataclass(frozen=True)
class Gallery:
    """The cards of one kind, of one evaluation of one run."""

    title: str
    subtitle: str
    cards: list[Card]


def galleries(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Gallery]:
    """A gallery for each kind of examples that a run wrote."""
    return [
        Gallery(
            _KINDS.get(kind, kind),
            evaluation if len(runs) == 1 else f"{evaluation}, {name}",
            [_card(run, evaluation, example) for example in examples],
        )
        for name, run in zip(names, runs, strict=True)
        for evaluation, kinds in run.examples.items()
        for kind, examples in kinds.items()
        if examples
    ]


def _card(run: RunRecord, evaluation: str, example: Mapping[str, Any]) -> Card:
    return Card(
        picture=_embedded(run.path / EXAMPLES / evaluation, str(example["image"])),
        rank=four_digits(example["rank"]),
        is_first=example["rank"] == 1,
        captions=list(example["captions"][:_MOST_CAPTIONS]),
        num_more=max(0, len(example["captions"]) - _MOST_CAPTIONS),
        retrieved=[
            (caption["text"], caption["correct"], f"{caption['score']:.2f}") for caption in example["retrieved"]
        ],
    )


def _embedded(folder: Path, name: str) -> str | None:
    """The picture as a data URL; a listing may name anything: only pictures in its own folder are shown."""
    try:
        shown = picture(below(folder, name, str(folder / EXAMPLES_FILE)).read_bytes())
    except (OSError, ValueError, BadSampleError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(shown).decode()}"
