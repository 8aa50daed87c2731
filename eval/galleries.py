"""The best and worst images of runs, as pictures inside the page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.samples.bad_sample import BadSampleError
from eval.examples import EXAMPLES_FILE, picture
from eval.figures import four_digits
from eval.run_record import RunRecord
from vlm.paths import below
from vlm.training.run_files import EXAMPLES

_MOST_CAPTIONS = 2
_GOOD_CIDER_D = 1.0


class Line(NamedTuple):
    """A line of a card: a text, the number beside it, and whether the text is right; None where nobody can say."""

    text: str
    value: str
    correct: bool | None = None
    label: str = ""


@dataclass(frozen=True)
class Card:
    """One image (None: it is lost), its true captions, how well the model did, and the texts that it chose or wrote."""

    picture: str | None
    badge: str
    is_good: bool
    captions: list[str]
    num_more: int
    lines: list[Line]


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
            f"{kind} {'captions' if 'generated' in examples[0] else 'retrievals'}".capitalize(),
            evaluation if len(runs) == 1 else f"{evaluation}, {name}",
            [_card(run, evaluation, example) for example in examples],
        )
        for name, run in zip(names, runs, strict=True)
        for evaluation, kinds in run.examples.items()
        for kind, examples in kinds.items()
        if examples
    ]


def _card(run: RunRecord, evaluation: str, example: Mapping[str, Any]) -> Card:
    badge, is_good, lines = _generated(example) if "generated" in example else _retrieved(example)
    return Card(
        picture=_embedded(run.path / EXAMPLES / evaluation, str(example["image"])),
        badge=badge,
        is_good=is_good,
        captions=list(example["captions"][:_MOST_CAPTIONS]),
        num_more=max(0, len(example["captions"]) - _MOST_CAPTIONS),
        lines=lines,
    )


def _retrieved(example: Mapping[str, Any]) -> tuple[str, bool, list[Line]]:
    lines = [Line(one["text"], f"{one['score']:.2f}", one["correct"]) for one in example["retrieved"]]
    return f"rank {four_digits(example['rank'])}", example["rank"] == 1, lines


def _generated(example: Mapping[str, Any]) -> tuple[str, bool, list[Line]]:
    lines = [
        Line(one["text"], f"{one['log_likelihood']:.1f}", label=one["method"].replace("_", " "))
        for one in example["generated"]
    ]
    return f"CIDEr-D {example['cider_d']:.2f}", example["cider_d"] >= _GOOD_CIDER_D, lines


def _embedded(folder: Path, name: str) -> str | None:
    """The picture as a data URL; a listing may name anything: only pictures in its own folder are shown."""
    try:
        shown = picture(below(folder, name, str(folder / EXAMPLES_FILE)).read_bytes())
    except (OSError, ValueError, BadSampleError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(shown).decode()}"
