"""Questions of number: a caption with its number's word, and the same with each other number's in its place."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from data.counterfactuals.numbers import WORDS, only_number, with_every
from data.loading.heldout import HeldOutSet
from eval.choices.config import QuestionsConfig
from eval.choices.files import BenchmarkFile, Entry, entries_of, record_of
from eval.choices.pictures import Pictures, ShardPictures, missing_words, names_of_urls
from eval.choices.question import Question, Questions
from eval.evaluator import EvaluationContext
from vlm.errors import UserError
from vlm.skip import Skip

_LEAST, _MOST = min(WORDS), max(WORDS)
_TEXT_KEYS = ("text", "captions", "caption")
_NAME_KEYS = ("image", "file", "filename", "key", "source_name")
_OTHERS = {"negative_caption", "true_caption", "caption_options", "caption_0"}


class _Counted(NamedTuple):
    """A caption and its number; or the reason why nothing is asked."""

    caption: str
    number: int
    reason: str = ""


def question_of(image: int, caption: str, number: int, numbers: Sequence[int]) -> Question:
    """The question which of the captions is true; its kind is the number, the others follow in their order.

    Every occurrence of the number's word is replaced, in its case, and no other number (CountBench: Paiss et al.,
    2023).
    """
    others = (with_every(caption, number, other) for other in numbers if other != number)
    return Question(image, (caption, *others), str(number))


def numbers_of(question: Question, numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers that a question's texts name, in their order."""
    truth = int(question.kind)
    return (truth, *(number for number in numbers if number != truth))


def counting_questions(config: QuestionsConfig, numbers: Sequence[int], context: EvaluationContext) -> Questions:
    """The questions of a file, or of shards that ask by themselves.

    Raises:
        UserError: the file is no such benchmark, or there is no question at all.
    """
    files = config.files(context.root, context.where)
    if not files:
        return _of_shards(config.held_out(context, config.limit), numbers, context.where("shards"))
    return _of_entries(files, config, numbers, context)


def check_entries(files: Sequence[BenchmarkFile]) -> list[Entry]:
    """The entries of CountBench or of numbers by key, of all files in a row. Raises UserError for one that is none."""
    for file in files:
        if isinstance(file.value, dict) and any(isinstance(value, list) for value in file.value.values()):
            file.refuse(
                "an object of lists, as SugarCrepe's, not a list of objects with a number (kind: compositional)"
            )
    entries = [entry for file in files for entry in entries_of(file, file.value)]
    for entry in entries:
        other = sorted(_OTHERS & entry.values.keys())
        if other:
            entry.refuse(f"it has {other[0]}: this is a benchmark of wrong captions (kind: compositional)")
        entry.number("number", _LEAST, _MOST)
        _texts(entry)
    _names(entries)
    return entries


def _texts(entry: Entry) -> tuple[str, ...]:
    """The captions of an entry; none where its sample in the shards has them. Raises UserError for other content."""
    key = next((key for key in _TEXT_KEYS if key in entry.values), None)
    if key is None:
        if not any(name in entry.values for name in _NAME_KEYS):
            entry.text("text")
        return ()
    return (entry.text(key),) if isinstance(entry.values[key], str) else entry.texts(key, 1)


def _of_entries(
    files: Sequence[BenchmarkFile], config: QuestionsConfig, numbers: Sequence[int], context: EvaluationContext
) -> Questions:
    entries = check_entries(files)
    names = _names(entries)
    pictures, where = config.pictures(context), context.where("file")
    asked: list[Question] = []
    skipped: list[Skip] = []
    missing: list[int] = []
    unasked = 0
    for place, entry in enumerate(entries[: config.limit]):
        number = entry.values["number"]
        if number not in numbers:
            unasked += 1
        elif (image := pictures.find(names[place], entry.words)) is None:
            missing.append(place)
        elif (caption := _caption(entry, pictures, image, number)) is None:
            skipped.append(_skip(entry, where, f"no caption has the word of its number ({WORDS[number]})"))
        else:
            asked.append(question_of(image, caption, number, numbers))
    notices = [f"{where}: {unasked:,} entries have a number that is not asked for (numbers)"] if unasked else []
    if missing:
        words = missing_words(pictures, len(missing), len(entries[: config.limit]), names[missing[0]])
        notices.append(f"{where}: {words}")
    if not asked:
        lines = notices or [f"{where}: {skip.key}: {skip.reason}" for skip in skipped[:1]]
        raise UserError(f"{'; '.join(lines)}: nothing is left to ask")
    records = {"file": record_of(files, len(entries)), **pictures.records}
    return Questions(pictures.images(), tuple(asked), records, tuple(notices), tuple(skipped), len(missing))


def _names(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The names under which each entry's image may lie: those that it says, else those of its address and place."""
    urls = [entry.values.get("image_url") for entry in entries]
    by_url = names_of_urls([url if isinstance(url, str) else None for url in urls])
    named = (tuple(entry.text(key) for key in _NAME_KEYS if entry.values.get(key) is not None) for entry in entries)
    return [own or other for own, other in zip(named, by_url, strict=True)]


def _caption(entry: Entry, pictures: Pictures, image: int, number: int) -> str | None:
    """The first caption with the number's word."""
    captions = _texts(entry)
    if not captions and isinstance(pictures, ShardPictures):
        captions = pictures.images().captions[image]
    return next((caption for caption in captions if has_word(caption, number)), None)


def has_word(caption: str, number: int) -> bool:
    """Whether a caption has a number's word, in whatever case."""
    return with_every(caption, number, _LEAST if number != _LEAST else _MOST) != caption


def _skip(entry: Entry, where: str, reason: str) -> Skip:
    return Skip(where, str(entry.file.path), entry.place, reason, "")


def _of_shards(held_out: HeldOutSet, numbers: Sequence[int], where: str) -> Questions:
    asked: list[Question] = []
    reasons: Counter[str] = Counter()
    for image, captions in enumerate(held_out.captions):
        found = counted(captions, held_out.fields(image))
        if not found.reason and found.number not in numbers:
            found = found._replace(reason="a number that is not asked for (numbers)")
        if found.reason:
            reasons[found.reason] += 1
        else:
            asked.append(question_of(image, found.caption, found.number, numbers))
    words = "; ".join(f"{count:,} with {reason}" for reason, count in reasons.most_common())
    notice = f"{where}: {reasons.total():,} of {len(held_out):,} samples ask nothing: {words}"
    if not asked:
        raise UserError(f"{notice}; spelled numbers from {WORDS[_LEAST]} to {WORDS[_MOST]} are asked for")
    return Questions(held_out, tuple(asked), {"shards": held_out.record}, (notice,) if reasons else ())


def counted(captions: Sequence[str], fields: dict[str, Any]) -> _Counted:
    """The caption of a sample that is asked about, and the true number; or why there is none.

    With a `number` in its json that is the truth, and the first caption with its word is asked about. Without one it is
    the first caption with exactly one spelled number; where the json has `counts` of things, it has to be one of them.
    """
    if "number" in fields:
        number = fields["number"]
        if type(number) is not int or number not in WORDS:
            return _Counted("", 0, f"a number in their json that is not one of {_LEAST} to {_MOST}")
        caption = next((caption for caption in captions if has_word(caption, number)), None)
        return _Counted(caption or "", number, "" if caption else "no caption that has their number's word")
    spelled = [(caption, word.value) for caption in captions if (word := only_number(caption)) is not None]
    if not spelled:
        return _Counted("", 0, "no caption of exactly one spelled number")
    counts = fields.get("counts")
    if not isinstance(counts, dict):
        return _Counted(*spelled[0])
    true = [one for one in spelled if any(type(count) is int and count == one[1] for count in counts.values())]
    return _Counted(*true[0]) if true else _Counted("", 0, "a spelled number that is none of their counts")
