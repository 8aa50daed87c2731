"""Whether the tokenizer and the model belong together, and how many captions the text tower cuts off."""

from collections.abc import Iterable, Iterator

import numpy as np

from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.patterns import expand_shards
from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding
from vlm.errors import UserError
from vlm.model.build import build_shapes
from vlm.model.dual_encoder import DualEncoder
from vlm.model.vocabulary import num_embeddings

_WORDS = ("a photo of a dog", "zwei Katzen auf einem Tisch", "1 2 3", "\u6f22\u5b57 and \U0001f600")
_MOST_CUT = 0.05


@CHECKS.register("tokenizer")
class TokenizerAndModel(Check):
    """The model of a recipe, built without its memory, beside its tokenizer and the lengths of the data's captions."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        model, _ = build_shapes(place.needed.model)
        yield _vocabulary(model)
        yield from _lengths(place, model.text.context_length)


def _vocabulary(model: DualEncoder) -> Finding:
    """The finding on token ids that have no embedding."""
    rows, highest = num_embeddings(model.text), int(model.tokenizer(_WORDS).tokens.max())
    words = f"{rows:,} embeddings of tokens, texts of up to {model.text.context_length}"
    if highest >= rows:
        words = f"{words}; the tokenizer makes token {highest}"
        return Finding("tokenizer", "fail", words, "the tokenizer that the model was made for")
    return Finding("tokenizer", "ok", words)


def _lengths(place: Place, context: int) -> Iterator[Finding]:
    """The finding on captions longer than the tower reads, counted in tokens of CLIP when shards were indexed."""
    recipe = place.needed
    cache = ShardCache(recipe.data.cache, recipe.data.retry)
    for name, source in recipe.data.sources.items():
        index = FolderIndex(cache, f"data.sources.{name}.shards")
        try:
            shards = expand_shards(source.patterns, recipe.data.root, index.where)
            if recipe.data.mode == "sequential" or len(index.known(shards)) < len(shards):
                continue
            tokens = np.asarray(index.statistics(shards).tokens)
        except UserError:
            continue  # the sources' own check says it
        cut = tokens[context + 1 :].sum() / max(1, tokens.sum())
        words = f"{name}: {cut:.1%} of captions have more than {context} of CLIP's tokens"
        fix = "model.towers.text.context_length, or shorter captions: their ends are not seen"
        yield Finding("tokenizer", "warn" if cut > _MOST_CUT else "ok", words, fix)
