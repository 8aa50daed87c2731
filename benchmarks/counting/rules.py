"""What each editor finds in real captions: how many captions it applies to, and how many of its edits it had to drop.

    python -P -m benchmarks.counting.rules DATA

DATA has countbench.json and the shards of Flickr8k. Every caption is edited once by every editor; then each edit of a
number is turned back, which has to give the caption again, byte for byte.
"""

import argparse
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.result_cache import machine
from data.counterfactuals.config import CounterfactualsConfig
from data.counterfactuals.counterfactual import counterfactuals
from data.counterfactuals.editor import CaptionInSample
from data.counterfactuals.numbers import number_words, with_every, with_number

EDITORS = CounterfactualsConfig.model_validate(
    {
        "editors": {
            "number": {},
            "colour": {},
            "attribute": {},
            "noun": {},
            "swap": {},
            "swap-attributes": {"kind": "swap", "of": "attributes"},
            "word_order": {},
            "negation": {},
        },
        "per_caption": "each",
    }
)


def flickr8k(data: Path) -> Iterator[CaptionInSample]:
    """All captions of Flickr8k, each with those of its picture."""
    for shard in sorted(data.glob("flickr8k-*.tar")):
        with tarfile.open(shard) as stored:
            for member in stored:
                if member.name.endswith(".json"):
                    content = stored.extractfile(member)
                    assert content is not None
                    captions = tuple(json.loads(content.read())["captions"])
                    yield from (CaptionInSample(text, captions) for text in captions)


def countbench(data: Path) -> list[CaptionInSample]:
    """The captions of CountBench."""
    entries = json.loads((data / "countbench.json").read_text())
    broken = [one for one in entries if with_every(one["text"], one["number"], 2) == one["text"] and one["number"] != 2]
    if broken:
        raise SystemExit(f"countbench.json: {len(broken)} captions lack their number")
    return [CaptionInSample(one["text"], (one["text"],)) for one in entries]


def report(name: str, captions: list[CaptionInSample]) -> None:
    """Edit all captions and print what came of it."""
    made, failed, numbers, back = Counter[str](), Counter[str](), Counter[int](), 0
    for place, caption in enumerate(captions):
        found = number_words(caption.text)
        numbers[min(len(found), 2)] += 1
        edited = counterfactuals(caption, EDITORS, (0, 0, place))
        failed.update(edited.failed)
        made.update(one.editor for one in edited.made)
        for one in edited.made:
            if one.editor == "number":
                (again,) = number_words(one.text)
                assert with_number(one.text, again, found[0].value) == caption.text
                back += 1
    total = len(captions)
    print(
        f"\n{name}: {total:,} captions; {numbers[0]:,} without a number, {numbers[1]:,} with one, {numbers[2]:,} with"
    )
    print(f"several; {back:,} numbers replaced and turned back\n")
    print("| editor | captions edited | share | edits that were true each time |\n|---|---|---|---|")
    for editor in EDITORS.editors:
        print(f"| {editor} | {made[editor]:,} | {made[editor] / total:.1%} | {failed[editor]:,} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    print(machine())
    report("Flickr8k", list(flickr8k(data)))
    report("CountBench", countbench(data))


if __name__ == "__main__":
    main()
