"""A tokenizer of whole words, made of the captions of a training split, as transformers reads one from a folder."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

MARKS = {"pad_token": "[pad]", "bos_token": "[start]", "eos_token": "[end]", "unk_token": "[unknown]"}


def captions_of(shards: Iterable[Path]) -> list[str]:
    """All captions in the json members of shards."""
    captions = []
    for shard in shards:
        with tarfile.open(shard) as members:
            for member in members:
                if member.name.endswith(".json") and (content := members.extractfile(member)) is not None:
                    captions += json.load(content)["captions"]
    return captions


def write_tokenizer(captions: Iterable[str], folder: Path, least: int = 5) -> int:
    """Write a tokenizer of all words that come `least` times, in lower case, into a folder; the number of its tokens.

    Texts are marked at both ends; the padding has id 0. Frequent words come first, as frequent ones by the alphabet.
    """
    words = Tokenizer(models.WordLevel({}, MARKS["unk_token"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    counts = Counter(word for caption in captions for word, _ in words.pre_tokenizer.pre_tokenize_str(caption.lower()))
    frequent = sorted((word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word))
    tokens = {token: number for number, token in enumerate([*MARKS.values(), *frequent])}
    words.model = models.WordLevel(tokens, MARKS["unk_token"])
    words.add_special_tokens(list(MARKS.values()))
    start, end = MARKS["bos_token"], MARKS["eos_token"]
    words.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokens[start]), (end, tokens[end])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **MARKS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)
