"""The rule that drops a caption, given the counts: a function of its row alone, so that no order of rows matters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.check.near import HashIndex
from data.filter.counts import Counts, image_id
from data.filter.rules import AlignRules, Rule
from data.filter.words import gram_ids, grams

RULES: Final = tuple(Rule)
NO_RULE: Final = len(RULES)
"""The number of rules: the first rule to hit a caption that none hits."""


@dataclass(frozen=True)
class TestPictures:
    """The pictures that must not be trained on: hashes of their looks (without `NO_HASH`) and of their files."""

    __test__ = False  # no test of pytest's

    pictures: NDArray[np.uint64]
    files: NDArray[np.uint64]


@dataclass(frozen=True)
class Lists:
    """The sets that rules look up, as sorted arrays in files that all processes map into their memory."""

    folder: Path

    def array(self, name: str) -> NDArray[np.uint64]:
        """One of "shared_texts", "crowded_images", "frequent_grams", "test_files", "test_pictures"."""
        return _mapped(self.folder / f"{name}.npy")


def make_lists(counts: Counts, rules: AlignRules, tests: TestPictures, folder: Path) -> Lists:
    """Write what the rules look up into `folder`, whose name must tell these counts, rules and pictures from others."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "shared_texts": counts.shared_texts(rules.max_images_per_text),
        "crowded_images": counts.crowded_images(rules.max_texts_per_image),
        "frequent_grams": counts.frequent_grams(rules.max_ngrams, rules.min_ngram_count),
        "test_files": np.unique(tests.files),
        "test_pictures": np.unique(tests.pictures),
    }
    for name, array in arrays.items():
        aside = folder / f".{name}.partial.npy"
        np.save(aside, array)
        aside.replace(folder / f"{name}.npy")
    return Lists(folder)


def apply_rules(rows: pl.DataFrame, rules: AlignRules, lists: Lists) -> pl.DataFrame:
    """The rows with a column for each rule (whether it would drop the row) and `first`, the number of the first one."""
    width, height = pl.col("width").cast(pl.Int64), pl.col("height").cast(pl.Int64)
    short, long = pl.min_horizontal(width, height), pl.max_horizontal(width, height)
    tests = _among(rows, pl.col("file_id"), lists.array("test_files")) | _near_test(rows, lists, rules.distance_bits)
    frequent = None if Rule.RARE_TOKEN in rules.without else lists.array("frequent_grams")
    hits: dict[Rule, pl.Expr] = {
        Rule.MIN_SIDE: short <= rules.min_side,
        Rule.ASPECT_RATIO: long >= rules.max_aspect_ratio * short,
        Rule.TEXTS_PER_IMAGE: pl.lit(_among(rows, image_id(rules.image_identity), lists.array("crowded_images"))),
        Rule.TEST_DUPLICATE: pl.lit(tests),
        Rule.IMAGES_PER_TEXT: pl.lit(_among(rows, pl.col("text_id"), lists.array("shared_texts"))),
        Rule.RARE_TOKEN: pl.lit(_rare(rows["words"].to_list(), frequent)),
        Rule.LENGTH: ~pl.col("num_words").is_between(rules.min_words, rules.max_words),
    }
    usable = pl.col("unusable").is_null()
    on = {rule: pl.lit(rule not in rules.without) for rule in hits}
    flags = {Rule.UNUSABLE: ~usable, **{rule: usable & hit.fill_null(False) & on[rule] for rule, hit in hits.items()}}
    rows = rows.with_columns(flag.alias(f"drops_{rule}") for rule, flag in flags.items())
    first = pl.coalesce(*(pl.when(drops(rule)).then(number) for number, rule in enumerate(RULES)), NO_RULE)
    return rows.with_columns(first=first)


def drops(rule: Rule) -> pl.Expr:
    """The column that tells whether a rule would drop a row."""
    return pl.col(f"drops_{rule}")


def _among(rows: pl.DataFrame, column: pl.Expr, ids: NDArray[np.uint64]) -> pl.Series:
    """Whether each row's id is one of the sorted `ids`."""
    values = rows.select(column.fill_null(0)).to_series()
    known = rows.select(column.is_not_null()).to_series()
    return pl.Series(_contains(ids, values.to_numpy()) & known.to_numpy())


def _near_test(rows: pl.DataFrame, lists: Lists, distance_bits: int) -> pl.Series:
    near = np.zeros(len(rows), dtype=bool)
    known = np.flatnonzero(rows["picture"].is_not_null().to_numpy())
    index = _index(lists.folder / "test_pictures.npy", distance_bits)
    near[known[index.nearest(rows["picture"].drop_nulls().to_numpy()).rows]] = True
    return pl.Series(near)


def _rare(texts: Sequence[str | None], frequent: NDArray[np.uint64] | None) -> pl.Series:
    """Whether each text has a unigram or bigram that is not frequent; none has where nothing is known of that."""
    rare = np.zeros(len(texts), dtype=bool)
    if frequent is not None:
        ids_by_text = [gram_ids(grams(text or "")) for text in texts]
        owners = np.repeat(np.arange(len(ids_by_text)), [len(ids) for ids in ids_by_text])
        ids = np.fromiter((name for text_ids in ids_by_text for name in text_ids), dtype=np.uint64, count=len(owners))
        rare[owners[~_contains(frequent, ids)]] = True
    return pl.Series(rare)


def _contains(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return np.asarray(ordered[places] == values)


@lru_cache(maxsize=16)
def _mapped(path: Path) -> NDArray[np.uint64]:
    array: NDArray[np.uint64] = np.load(path, mmap_mode="r")
    return array  # of a folder's own name, so never stale


@lru_cache(maxsize=2)
def _index(path: Path, distance_bits: int) -> HashIndex:
    return HashIndex(_mapped(path), distance_bits)
