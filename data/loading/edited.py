"""Parts of a batch that are made from its own: counterfactual captions, and degraded copies of images."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.counterfactuals.counterfactual import Edited
from data.counterfactuals.editor import CaptionInSample
from data.images.degrade import DegradedConfig
from data.samples.bad_sample import BadSampleError
from data.samples.captions import captions_by_field
from data.shards.reader import ShardReader
from data.shards.source import Source
from data.shards.tar import TEXT_SUFFIXES
from data.source_names import recipe_key
from vlm.batch import Counterfactuals, DegradedImages, Texts, editor_key
from vlm.errors import UserError
from vlm.model.tokenizer import TokenBatch

Tokenize = Callable[[Sequence[str]], TokenBatch]
_LOOKED_AT = 200  # samples of a source, before the first step


def counterfactual_texts(edited: Sequence[Edited | None], texts: Texts, tokenizer: Tokenize) -> Counterfactuals:
    """The counterfactuals of each sample; none whose tokens are those of the sample's text, which was cut before."""
    made = [(sample, one) for sample, each in enumerate(edited) if each is not None for one in each.made]
    owners = torch.tensor([sample for sample, _ in made], dtype=torch.int64)
    editors = torch.tensor([editor_key(one.editor) for _, one in made], dtype=torch.int64)
    if not made:
        return Counterfactuals(torch.zeros(0, 1, dtype=torch.int64), owners, editors, owners=owners)
    tokens, lengths = tokenizer([one.text for _, one in made])
    others = ~_equal(tokens, lengths, texts.tokens[owners], texts.lengths[owners])
    return Counterfactuals(tokens[others], lengths[others], editors[others], owners=owners[others])


def counts_by_editor(edited: Sequence[Edited | None]) -> dict[str, int]:
    """Numbers of counterfactuals by editor, and of captions that should have one and have none: logged as shares."""
    counts = Counter(f"counterfactual/{one.editor}" for each in edited if each is not None for one in each.made)
    counts["counterfactual/none"] += sum(each is not None and not each.made for each in edited)
    return {name: count for name, count in counts.items() if count}


def degraded_images(
    copies: Sequence[tuple[float | None, tuple[int, int, int]]], config: DegradedConfig, pixels: NDArray[np.uint8]
) -> DegradedImages:
    """The degraded copies of a batch's images by strength and key, written behind them in `pixels` [rows, 3, S, S]."""
    strengths, owners = list[float](), list[int]()
    for sample, (strength, key) in enumerate(copies):
        if strength is not None:
            config.write(pixels[sample], strength, key, pixels[len(copies) + len(owners)])
            strengths.append(strength)
            owners.append(sample)
    return DegradedImages(
        without_extent(len(owners)),
        torch.tensor(strengths, dtype=torch.float32),
        owners=torch.tensor(owners, dtype=torch.int64),
    )


def require_editable(source: Source, config: DataConfig, reader: ShardReader) -> None:
    """Refuse a source of counterfactuals none of whose first captions has anything that its editors edit.

    Raises:
        UserError: naming the source, its shard, the editors and a caption.
    """
    counterfactuals, policy = config.counterfactuals_of(source.name), config.caption_of(source.name)
    if counterfactuals is None:
        return
    shown, looked_at = "", 0
    for number in range(min(source.num_samples, _LOOKED_AT)):
        try:
            sample = source.read(*source.place(number), reader, TEXT_SUFFIXES)
            by_field = captions_by_field(sample.parts.get("txt"), sample.fields, policy)
            captions = [text for texts in by_field.values() for text in texts]
            if any(
                editor.applies(CaptionInSample(text, tuple(captions), sample.fields))
                for text in captions
                for editor in counterfactuals.editors.values()
            ):
                return
        except (BadSampleError, OSError):
            continue
        shown, looked_at = shown or next(iter(captions), ""), looked_at + len(captions)
    if looked_at:
        names = ", ".join(counterfactuals.editors)
        raise UserError(
            f"{recipe_key(source.name)}.counterfactuals: none of the first {looked_at} captions of {source.shards[0]} "
            f"has anything that {names} could edit; the first is {shown!r:.80}"
        )


def without_extent(rows: int) -> UInt8[Tensor, "rows 3 0 0"]:
    """What stands for pixels that come another way."""
    return torch.zeros(rows, 3, 0, 0, dtype=torch.uint8)


def _equal(tokens: Tensor, lengths: Tensor, others: Tensor, other_lengths: Tensor) -> Bool[Tensor, " rows"]:
    """Whether each text has the tokens of the other one; both are padded, to widths of their own."""
    width = min(tokens.shape[1], others.shape[1])
    inside = torch.arange(width) < lengths[:, None]
    same: Tensor = ((tokens[:, :width] == others[:, :width]) | ~inside).all(1)
    return same & (lengths == other_lengths)
