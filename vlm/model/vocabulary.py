"""Whether a tokenizer and a text tower speak of the same tokens."""

from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from vlm.errors import UserError
from vlm.model.tokenizer import FullTokenizer
from vlm.model.towers import TextTower

_FAR_SMALLER = 4  # a vocabulary is filled up to a round number, never to four times its size
_SPARE = 1.05  # tokens beyond the vocabulary that no text holds: reserved ones of some released tokenizers
_SPECIAL = ("pad", "unk", "bos", "eos", "cls", "sep")


def require_vocabulary(full: FullTokenizer, tower: TextTower, *, learned: bool) -> int:
    """The number of tokens that the tower knows. Raises UserError when they cannot be the tokenizer's.

    Of a model that was trained elsewhere (`learned`) a far smaller tokenizer cannot be its own.
    """
    known = num_embeddings(tower)
    size, needed = _tokens(full)
    if needed > known or size > known * _SPARE:
        most = max(needed, size)
        raise UserError(f"model: the tokenizer has {most:,} tokens, but the text tower's vocabulary only {known:,}")
    if learned and size * _FAR_SMALLER < known:
        raise UserError(
            f"model: the tokenizer has {size:,} tokens of the text tower's {known:,}: it is not the model's own, and "
            "most words would be unknown"
        )
    return known


def num_embeddings(tower: TextTower) -> int:
    """The tokens that a tower knows. Raises UserError for a tower that embeds none."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Embedding) and "position" not in name and "type" not in name:
            return module.num_embeddings
    raise UserError("model: the text tower has no embedding of tokens")


def _tokens(full: FullTokenizer) -> tuple[int, int]:
    """How many tokens there are, and one more than the largest id that any text must be expected to have."""
    if isinstance(full, SimpleTokenizer):
        return full.vocab_size, full.vocab_size
    tokenizer: Any = full.tokenizer  # type: ignore[attr-defined]
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL]
    return len(tokenizer), 1 + max(int(number) for number in [0, *special] if number is not None)
