"""The tokenizer of scenes' captions: each of their words is one token, and any other text is taken by its bytes.

    python -m data.scenes.tokenizer > vlm/model/tokenizers/scenes.json

CLIP's vocabulary has 49,408 tokens, of which scenes need 120: a decoder of the demo's size would spend nearly all its
time on the others.
"""

import json
import sys
from random import Random
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.scenes.captions import caption
from data.scenes.layout import sample_scene

PAD, START, END = "<pad>", "<|startoftext|>", "<|endoftext|>"
_NUM_SCENES: Final = 20_000
_MOST_TOKENS: Final = 1024  # more than there are words and parts of words


def build_tokenizer() -> Tokenizer:
    """Byte pairs of the words of rendered scenes; as in CLIP's vocabulary the token at the end has the largest id."""
    pairs = _trained_pairs()
    names = [PAD, *pairs["vocab"], START, END]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [(first, second) for first, second in pairs["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (PAD, START, END)])
    marks = [(name, vocabulary[name]) for name in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    return tokenizer


def _trained_pairs() -> dict[str, Any]:
    rng = Random(0)
    texts = (one.text for _ in range(_NUM_SCENES) for one in caption(sample_scene(rng), rng))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pairs: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return pairs


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Lowercase()


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=True)


if __name__ == "__main__":
    sys.stdout.write(build_tokenizer().to_str())
