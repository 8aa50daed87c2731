"""A captioning decoder attached to the towers of a dual encoder, and the parameters that no output reaches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlm.batch import DEGRADED, DOCUMENT_IMAGES, DOCUMENTS, BatchPart, Images, Texts
from vlm.errors import EveryRankError, UserError, reason
from vlm.model.captioner import CaptionDecoder, ImagePooler
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.document_memory import without_images
from vlm.model.dual_encoder import DualEncoder
from vlm.model.embedding_tokens import EmbeddingTokens
from vlm.model.gap_statistics import GapStatistics, weights_of
from vlm.model.language_model import restrict_training, split_decoder
from vlm.model.towers import TowerOutput
from vlm.model.trial import evaluating
from vlm.model.vocabulary import num_embeddings
from vlm.outputs import captioned_parts

_TEXTS = ("a dog", "two small cats on a table", "red")
_SAME = 1e-4  # of states before a token that was changed: rounding in another order


def attach_captioner(model: DualEncoder, config: CaptionerConfig, *, tried: bool = True) -> None:
    """Give a model the decoder of `config`, and the poolers that it asks for, with fresh weights.

    Unless it is `tried`, for want of values, the text tower is believed to be causal.

    Raises:
        EveryRankError: the towers tell no tokens, the text tower looks ahead, its texts have no marks at their ends, or
            sizes do not go together.
    """
    looks_at_tokens = config.pooler != "embedding"
    try:
        if looks_at_tokens:
            model.image.emit_tokens(config.feature_map)
        model.text.emit_tokens()
    except ValueError as error:
        raise EveryRankError(f"model.captioner: {error}") from None
    state_width = _token_width(model, "text")
    _require_marks(model)
    if tried:
        _require_causal(model)
    pools_itself = getattr(model.image.trunk, "attn_pool", None) is not None
    pooler = config.pooler or ("tower" if pools_itself else "cascade")
    if pools_itself and pooler not in ("tower", "embedding"):
        raise EveryRankError(
            f"model.captioner.pooler: found {pooler}; the image tower pools by attention itself (tower, or embedding)"
        )
    width, split = config.width or state_width, config.language_model
    config = config.model_copy(update={"pooler": pooler, "width": width if split is None else None})
    try:
        image_width = _token_width(model, "image") if looks_at_tokens else width
        if pooler == "embedding":
            model.embedding_tokens = EmbeddingTokens(config, model.embed_dim, width)
        elif pooler != "tower":
            model.image_pooler = ImagePooler(config, image_width, width, model.tower_dim)
            image_width = width
        if split is not None:
            model.decoder = split_decoder(model, config, image_width)
            restrict_training(model, split)
        else:
            quick_gelu = bool(model.config.quick_gelu)
            vocabulary = num_embeddings(model.text)
            model.decoder = CaptionDecoder(config, state_width, image_width, vocabulary, quick_gelu=quick_gelu)
    except UserError:
        raise  # it names its key
    except (AssertionError, ValueError) as error:
        raise EveryRankError(f"model.captioner: {reason(error)}") from None
    model.config = model.config.model_copy(update={"captioner": config.without_files()})


def read_gap_statistics(model: DualEncoder, config: CaptionerConfig) -> None:
    """Fill the model's buffers from the file that `config` names, if its gap is corrected.

    Raises:
        EveryRankError: it names none, or one that cannot be read or is of another model.
    """
    if config.gap is None or config.gap.correction == "none":
        return
    assert model.embedding_tokens is not None
    where = "model.captioner.gap.statistics"
    if config.gap.statistics is None:
        raise EveryRankError(f"{where}: correction: {config.gap.correction} needs the file that `vlm gap` writes")
    statistics = GapStatistics.read(Path(config.gap.statistics), weights_of(model), model.embed_dim, where)
    model.embedding_tokens.gap.fill(statistics)


@torch.no_grad()
def _token_width(model: DualEncoder, tower: Literal["image", "text"]) -> int:
    size = model.image_spec.size
    with evaluating(model):
        if tower == "image":
            made = model.image(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        else:
            made = model.text(*model.tokenizer(_TEXTS))
    assert isinstance(made, TowerOutput)
    return made.tokens.shape[-1]


@torch.no_grad()
def _require_causal(model: DualEncoder) -> None:
    """Raise EveryRankError when a token changes the states of those before it."""
    tokens, lengths = model.tokenizer(_TEXTS)
    row = int(lengths.argmax())
    place = int(lengths[row]) - 2
    changed = tokens.clone()
    changed[row, place] = (changed[row, place] + 1) % num_embeddings(model.text)
    with evaluating(model):
        before, after = model.text(tokens, lengths), model.text(changed, lengths)
    assert isinstance(before, TowerOutput)
    assert isinstance(after, TowerOutput)
    moved = (before.tokens - after.tokens)[row, :place].abs().max()
    if float(moved) > _SAME * float(before.tokens.abs().max()):
        raise EveryRankError(
            "model.captioner: the text tower is not causal: a token changes the states of those before it; a decoder "
            "that reads them would see the token that it is to tell"
        )


def _require_marks(model: DualEncoder) -> None:
    """Raise EveryRankError unless all texts begin with one token and end with one: a caption needs both."""
    tokens, lengths = model.tokenizer(_TEXTS)
    first = set(tokens[:, 0].tolist())
    last = set(tokens.gather(1, lengths[:, None] - 1)[:, 0].tolist())
    if len(first) > 1 or len(last) > 1 or int(lengths.min()) < 3:
        raise EveryRankError(
            "model.captioner: the tokenizer marks no beginning and no end of a text, so that nothing says where a "
            "caption begins and ends"
        )


@torch.enable_grad()
def freeze_unreached(model: DualEncoder, outputs: frozenset[str]) -> list[str]:
    """Freeze the parameters on which none of these outputs depends; their names.

    An engine that averages gradients would wait for theirs in vain. The cost is one forward and backward of one pair.
    """
    device, size = model.logit_scale.device, model.image_spec.size
    batch = model.tokenizer(_TEXTS[:1])
    texts = Texts(batch.tokens, batch.lengths)
    inputs: dict[str, BatchPart] = {
        "image": Images(torch.zeros(1, 3, size, size, dtype=torch.uint8)),
        "text": texts,
    }
    if "captions" in {*outputs, *captioned_parts(outputs), *captioned_parts(outputs, "text")}:
        inputs["captions"] = Texts(batch.tokens, batch.lengths, owners=torch.zeros(1, dtype=torch.long))
    inputs |= {DEGRADED: inputs["image"]} if DEGRADED in outputs else {}
    if DOCUMENTS in captioned_parts(outputs):
        document = replace(without_images(texts), num_images=torch.ones(1, dtype=torch.long))
        inputs |= {DOCUMENTS: document, DOCUMENT_IMAGES: inputs["image"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with evaluating(model):
        made: dict[str, Tensor] = model({name: part.to(device) for name, part in inputs.items()}, outputs)
        total = torch.stack([value.float().sum() for value in made.values()]).sum()
        gradients: Sequence[Tensor | None] = [None] * len(trainable)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    unreached = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    for name in unreached:
        trainable[name].requires_grad_(False)
    return unreached
