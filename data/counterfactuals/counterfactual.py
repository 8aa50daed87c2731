"""The counterfactual captions of one visit of a sample: drawn by the recipe's editors, none of them true."""

from collections.abc import Iterator
from typing import NamedTuple

from data.counterfactuals.config import CounterfactualsConfig
from data.counterfactuals.editor import CaptionInSample, Editor
from data.counterfactuals.truth import is_true
from data.randomness import Draws
from data.samples.captions import readable

_TRIES = 16  # of one editor, whose edits may turn out true


class Counterfactual(NamedTuple):
    """A caption that is almost right, and the name of the editor that made it."""

    text: str
    editor: str


class Edited(NamedTuple):
    """The counterfactuals of one visit, and the editors that apply to its caption but made nothing that is false."""

    made: tuple[Counterfactual, ...] = ()
    failed: tuple[str, ...] = ()


def counterfactuals(caption: CaptionInSample, config: CounterfactualsConfig, key: tuple[int | str, ...]) -> Edited:
    """The counterfactuals of a caption in one visit, keyed by `key` (seed, epoch, sample id) and the editors' names.

    What one editor draws does not depend on which others there are.

    Raises:
        BadSampleError: what an editor reads in the sample is not as it should be.
    """
    applying = {name: editor for name, editor in config.editors.items() if editor.applies(caption)}
    made: list[Counterfactual] = []
    failed: list[str] = []
    for name in _in_turn(applying, key) if config.per_caption == "one" else applying:
        edited = _false_edit(applying[name], caption, Draws("counterfactual", name, *key))
        if edited is None:
            failed.append(name)
            continue
        made.append(Counterfactual(edited, name))
        if config.per_caption == "one":
            break
    return Edited(tuple(made), tuple(failed))


def _in_turn(editors: dict[str, Editor], key: tuple[int | str, ...]) -> Iterator[str]:
    """The editors' names in a drawn order, each next one by weight among those that are left."""
    draws, left = Draws("counterfactual editor", *key), dict(editors)
    while left:
        total = sum(editor.weight for editor in left.values())
        name = draws.weighted({name: editor.weight / total for name, editor in left.items()})
        del left[name]
        yield name


def _false_edit(editor: Editor, caption: CaptionInSample, draws: Draws) -> str | None:
    """An edit that is not known to be true; None where none was drawn."""
    for _ in range(_TRIES):
        edited = readable(editor.edit(caption, draws))
        if not is_true(edited, caption):
            return edited
    return None
