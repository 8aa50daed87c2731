"""CLIP's byte pairs equal open_clip's `SimpleTokenizer.encode`, whatever the text."""

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from vlm.model import byte_pairs
from vlm.model.byte_pairs import BytePairs, clip_token_counts

REAL = Path(os.environ.get("VLM_TEST_DATA", "missing"))
LOWER = SimpleTokenizer()
OURS = BytePairs(LOWER)
CLEANED = {clean: SimpleTokenizer(clean=clean) for clean in ("whitespace", "canonicalize")}
OTHERS = {clean: (full, BytePairs(full)) for clean, full in CLEANED.items()}
AWKWARD = [
    *("<start_of_text>", "<END_of_text>", "<<start_of_text>>", "&lt;end_of_text&gt;", "start_of_text"),
    *("&", "&amp;", "&amp;amp;lt;", "&#39;s", "&nbsp;", "&#xD800;", "&notanentity;", "<b>&eacute;</b>"),
    *("Ã©", "â€™", "Ð¼Ð¸Ñ€", "donâ€™t", "\x85", "\ufeff", "ＬＯ", "ﬁ", "ﬆ", "“x”", "ｶﾞ"),  # noqa: RUF001
    *("'s", "'S", "'ſ", "'LL", "'re'", "\u2019ve", "İstanbul", "ı", "ΑΣ", "ẞ", "\u0345", "\u212a", "\u01c5"),  # noqa: RUF001
    *(
        "é",
        "e\u0301",
        "한국",
        "北京",
        "हिन्दी",
        "١٢",
        "Ⅷ",
        "½",
        "ⓐ",
        "👩‍👩‍👧",
        "🇫🇷",
        "\U0001f3fd",
        "\U0001e7f0",
        "\U00030000",
    ),
    *("\x00", "\x1b[31m", "\x7f", "\r\n", "\u2028", "\t", "  ", "\u3000", "\ud83d", "\ude00", "\udfff"),
    *("aaaa", "0123", "_", "a-b--c", "!!!!!!", "{}", "\\", "x" * 80, "supercalifragilistic", "\n"),
]
TEXT = st.one_of(
    st.text(max_size=80),
    st.text(st.characters(max_codepoint=127), max_size=80),
    st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=5)), max_size=12).map("".join),
    st.lists(st.sampled_from(AWKWARD), max_size=12).map(" ".join),
)


def expected(full: SimpleTokenizer, text: str) -> list[int]:
    return [full.sot_token_id, *full.encode(text), full.eot_token_id]


@settings(max_examples=400, deadline=None)
@given(TEXT)
@example("")
@example(" ".join(AWKWARD))
def test_any_text_has_the_ids_of_open_clip(text: str) -> None:
    assert OURS([text]) == [expected(LOWER, text)]


def test_every_ascii_character_is_cleaned_as_open_clip_cleans_it() -> None:
    texts = [f"A{chr(code)}b {chr(code)}{chr(code)}9 " for code in range(128)]
    assert OURS(texts) == [expected(LOWER, text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(TEXT)
@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_the_other_ways_of_cleaning(clean: str, text: str) -> None:
    full, ours = OTHERS[clean]
    assert ours([text]) == [expected(full, text)]


def test_special_tokens_of_a_users_own() -> None:
    full = SimpleTokenizer(additional_special_tokens=["<image>", "Ã©"])
    texts = ["an <image> here", "<IMAGE>", "é Ã©", "<image", *AWKWARD]
    assert BytePairs(full)(texts) == [expected(full, text) for text in texts]
    assert full.encoder["<image>"] in BytePairs(full)(["<image>"])[0]


def test_text_without_spaces_or_end() -> None:
    for text in ("ab" * 3000, "word " * 3000, "!" * 3000, "é" * 3000):
        assert OURS([text]) == [expected(LOWER, text)]


def test_full_memory_of_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pairs, "_MOST_WORDS", 3)
    ours = BytePairs(LOWER)
    texts = ["one two three four five", "five four three two one", "six"] * 2
    assert ours(texts) == [expected(LOWER, text) for text in texts]
    assert len(ours._words) <= 3


def test_counts_are_those_before_padding_and_before_the_cut() -> None:
    texts = [*AWKWARD, "", "word " * 100, "two words"]
    assert clip_token_counts(texts).tolist() == [len(LOWER.encode(text)) + 2 for text in texts]
    assert clip_token_counts(["two words"]).tolist() == [4]
    assert clip_token_counts([]).shape == (0,)


def test_pickled_it_says_the_same_and_carries_no_words() -> None:
    fresh = BytePairs(LOWER)
    before = len(pickle.dumps(fresh))
    ids = fresh(AWKWARD)
    stored = pickle.dumps(fresh)
    assert len(stored) < before * 1.01
    assert pickle.loads(stored)(AWKWARD) == ids  # noqa: S301


@pytest.mark.skipif(not REAL.is_dir(), reason="set VLM_TEST_DATA to a folder with the Flickr8k and CIFAR-10 shards")
def test_real_captions() -> None:
    captions = [str(pair["text"]) for pair in json.loads((REAL / "countbench.json").read_text())]
    with tarfile.open(REAL / "flickr8k-test-000000.tar") as shard:
        stored = [shard.extractfile(member) for member in shard if member.name.endswith(".json")]
        captions += [text for file in stored if file is not None for text in json.loads(file.read())["captions"]]
    assert len(captions) > 1000
    assert OURS(captions) == [expected(LOWER, text) for text in captions]
