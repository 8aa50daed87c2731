"""The tokenizer of whole words that a benchmark makes of training captions, as a recipe names it by its folder."""

from pathlib import Path

from benchmarks.captions.words import captions_of, write_tokenizer
from tests.data.small_shards import with_json, write_shard
from vlm.model.tokenizer import Tokenizer, full_tokenizer

CAPTIONS = ["A dog runs .", "a dog and a cat sit .", "The cat sees a bird !"]


def test_words_that_come_often_are_tokens_and_others_are_unknown(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tar", [with_json(n, captions=[caption]) for n, caption in enumerate(CAPTIONS)])
    found = captions_of([tmp_path / "train.tar"])
    assert found == CAPTIONS
    assert write_tokenizer(found, tmp_path / "words", least=2) == 4 + 4
    fields = {"hf_tokenizer_name": str(tmp_path / "words"), "context_length": 7}
    tokenizer = Tokenizer(full_tokenizer(fields), shorten=True, vocabulary=8)
    # pad 0, start 1, end 2, unknown 3; "a" comes four times, ".", "cat" and "dog" twice
    tokens, lengths = tokenizer(["A CAT runs.", "a dog", "a a a a a a a a"])
    assert tokens.tolist() == [[1, 4, 6, 3, 5, 2, 0], [1, 4, 7, 2, 0, 0, 0], [1, 4, 4, 4, 4, 4, 2]]
    assert lengths.tolist() == [6, 4, 7]
    assert tokenizer.decode([1, 4, 7, 5, 2]) == "a dog ."
