"""Questions of composition: SugarCrepe, ARO and Winoground as published, and shards that name wrong captions."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from data.counterfactuals.editor import CaptionInSample
from data.counterfactuals.truth import is_true
from data.images.crop import Box
from data.loading.heldout import HeldOutSet
from data.samples.bad_sample import BadSampleError
from data.samples.captions import listed
from eval.choices.config import QuestionsConfig
from eval.choices.files import BenchmarkFile, Entry, entries_of, keys_shown, record_of
from eval.choices.pictures import missing_words
from eval.choices.question import Question, Questions
from eval.evaluator import EvaluationContext
from vlm.errors import UserError
from vlm.skip import Skip

_LARGEST = 10**6  # pixels of a box's edge from the image's
_LONGEST_KIND = 60
_NEGATIVES = "negatives"


class _Asked(NamedTuple):
    """A question before its image is found; `crossed` where it is the second of an example of two images."""

    entry: Entry
    image: str
    texts: tuple[str, ...]
    kind: str
    box: Box | None = None
    crossed: bool = False


def _sugarcrepe(entry: Entry, kind: str) -> list[_Asked]:
    texts = entry.text("caption"), entry.text("negative_caption")
    return [_Asked(entry, entry.text("filename"), texts, kind)]


def _aro_pair(entry: Entry, kind: str) -> list[_Asked]:
    texts = entry.text("true_caption"), entry.text("false_caption")
    box = None
    if any(key in entry.values for key in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")):
        left, top = (entry.number(key, -_LARGEST, _LARGEST) for key in ("bbox_x", "bbox_y"))
        width, height = (entry.number(key, 1, _LARGEST) for key in ("bbox_w", "bbox_h"))
        box = Box(left, top, left + width, top + height)
    attributes = entry.values.get("attributes")
    if "relation_name" in entry.values:
        kind = entry.text("relation_name")
    elif isinstance(attributes, list) and attributes:
        kind = "_".join(entry.texts("attributes", 1))
    return [_Asked(entry, entry.text("image_path"), texts, kind, box)]


def _aro_order(entry: Entry, kind: str) -> list[_Asked]:
    return [_Asked(entry, entry.text("image"), entry.texts("caption_options", 2), kind)]


def _winoground(entry: Entry, kind: str) -> list[_Asked]:
    texts = entry.text("caption_0"), entry.text("caption_1")
    tag = next((entry.text(key) for key in ("collapsed_tag", "tag") if entry.values.get(key)), kind)
    first, second = (_Asked(entry, entry.text(key), texts, tag) for key in ("image_0", "image_1"))
    return [first, second._replace(texts=texts[::-1], crossed=True)]


class _Format(NamedTuple):
    """A published format: the keys by one of which an entry is told to have it, all that it needs, and its reading."""

    name: str
    telling: tuple[str, ...]
    keys: tuple[str, ...]
    read: Callable[[Entry, str], list[_Asked]]


_FORMATS = (
    _Format("SugarCrepe", ("negative_caption",), ("filename", "caption", "negative_caption"), _sugarcrepe),
    _Format("ARO", ("true_caption", "false_caption"), ("image_path", "true_caption", "false_caption"), _aro_pair),
    _Format("ARO's orders", ("caption_options",), ("image", "caption_options"), _aro_order),
    _Format("Winoground", ("caption_0", "caption_1"), ("image_0", "image_1", "caption_0", "caption_1"), _winoground),
)


def check_entries(files: Sequence[BenchmarkFile]) -> list[list[_Asked]]:
    """The questions of each entry, without their images. Raises UserError for an entry that has none."""
    return [_format_of(entry).read(entry, kind) for file in files for entry, kind in _entries(file)]


def _entries(file: BenchmarkFile) -> list[tuple[Entry, str]]:
    """All entries with the kind that their list's name is, or else the file's."""
    stem = PurePath(file.path.name).stem
    if isinstance(file.value, dict) and any(isinstance(value, list) for value in file.value.values()):
        named = ((entry, kind) for kind, values in file.value.items() for entry in entries_of(file, values, kind))
        return list(named)
    return [(entry, stem) for entry in entries_of(file, file.value)]


def _format_of(entry: Entry) -> _Format:
    chosen = next((one for one in _FORMATS if any(key in entry.values for key in one.telling)), None)
    if chosen is not None:
        return chosen
    if "number" in entry.values:
        entry.refuse("it has a number: this is a benchmark of counting (kind: counting)")
    known = "; ".join(f"{one.name} ({', '.join(one.keys)})" for one in _FORMATS)
    return entry.refuse(f"no known format has its keys {keys_shown(entry)}; choose from: {known}")


def compositional_questions(config: QuestionsConfig, context: EvaluationContext) -> Questions:
    """The questions of files, or of shards whose samples name wrong captions.

    Raises:
        UserError: a file is no such benchmark, or there is no question at all.
    """
    files = config.files(context.root, context.where)
    if not files:
        return _of_shards(config.held_out(context, config.limit), context.where("shards"))
    entries = check_entries(files)
    pictures, where = config.pictures(context), context.where("file")
    asked: list[Question] = []
    crossed: list[tuple[int, int]] = []
    missing: list[str] = []
    for questions in entries[: config.limit]:
        images = [pictures.find((one.image,), one.entry.words, one.box) for one in questions]
        for one, image in zip(questions, images, strict=True):
            if image is not None:
                asked.append(Question(image, one.texts, kind_name(one.kind)))
            else:
                missing.append(one.image)
        if questions[-1].crossed and None not in images:
            crossed.append((len(asked) - 2, len(asked) - 1))
    num_images = sum(map(len, entries[: config.limit]))
    notices = [f"{where}: {missing_words(pictures, len(missing), num_images, missing[:1])}"] if missing else []
    if not asked:
        raise UserError(f"{notices[0]}: nothing is left to ask")
    records = {"file": record_of(files, len(entries)), **pictures.records}
    return Questions(
        pictures.images(),
        tuple(asked),
        records,
        tuple(notices),
        missing=len(missing),
        crossed=tuple(crossed),
    )


def kind_name(kind: str) -> str:
    """A kind as a part of a metric's name: letters and digits, and "_" for what lies between."""
    return re.sub(r"[^\w.-]+", "_", kind.strip())[:_LONGEST_KIND].strip("_") or _NEGATIVES


def _of_shards(held_out: HeldOutSet, where: str) -> Questions:
    asked: list[Question] = []
    reasons: Counter[str] = Counter()
    skipped: list[Skip] = []
    for image, captions in enumerate(held_out.captions):
        try:
            found = wrong_captions(captions, held_out.fields(image))
        except BadSampleError as error:
            skipped.append(held_out.skip(image, f"{_NEGATIVES}: {error}"))
            continue
        if not captions or not found:
            reasons["no caption" if not captions else f"no {_NEGATIVES} in their json that are wrong"] += 1
            continue
        asked += [Question(image, (captions[0], *texts), kind_name(kind)) for kind, texts in found.items()]
    notice = f"{where}: {reasons.total():,} of {len(held_out):,} samples ask nothing: " + "; ".join(
        f"{count:,} with {reason}" for reason, count in reasons.most_common()
    )
    if not asked:
        raise UserError(notice if reasons else f"{where}: {skipped[0].key}: {skipped[0].reason}")
    notices = (notice,) if reasons else ()
    return Questions(held_out, tuple(asked), {"shards": held_out.record}, notices, tuple(skipped))


def wrong_captions(captions: Sequence[str], fields: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The wrong captions in a sample's json by kind: `negatives`, a list, or an object of lists.

    What is true after all, as training has it (`data.counterfactuals.truth`), is left out.

    Raises:
        BadSampleError: one is no text.
    """
    stored = fields.get(_NEGATIVES)
    by_kind = stored if isinstance(stored, dict) else {_NEGATIVES: stored}
    texts = {str(kind): [text for text in map(str.strip, listed(value)) if text] for kind, value in by_kind.items()}
    about = CaptionInSample(captions[0] if captions else "", tuple(captions), fields)
    wrong = {kind: tuple(text for text in of_kind if not is_true(text, about)) for kind, of_kind in texts.items()}
    return {kind: of_kind for kind, of_kind in wrong.items() if of_kind}
