"""A rehearsal of the first step, before anything is written: what would be refused there is refused here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from vlm.batch import DOCUMENT_IMAGES, DOCUMENTS, Batch, BatchPart, Images, Texts
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason
from vlm.model.document_memory import without_images
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.objectives.term import Provider, Term
from vlm.outputs import Sight, captioned_parts, likelihood_of
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

_MOST_PAIRS = 64
_WORDS = ("a rehearsal", "of the first step")


@torch.no_grad()
def rehearse(  # noqa: PLR0913 - what model, recipe and data bring
    model: DualEncoder,
    terms: Mapping[str, Term],
    providers: Mapping[str, Provider],
    similarity: SimilarityConfig,
    *,
    num_pairs: int,
    labels: bool,
    captions: bool,
    images: bool = True,
    documents: bool = False,
) -> None:
    """Embed one pair, and evaluate an objective like the run's on some drawn embeddings. Changes nothing.

    `labels`, `captions`, `images` and `documents` say whether the data brings them. The cost is one forward of one
    pair.

    Raises:
        EveryRankError: a tower cannot read what data will give it, or a term misses something in model or data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _embed_a_pair(model)
        brings = {"labels": labels, "captions": captions, "images": images, "documents": documents}
        batch = _batch(min(num_pairs, _MOST_PAIRS), **brings)
        facts = RunFacts(model.embed_dim, len(batch), 1, 1, 0, World())
        exchange = Exchange(World(), similarity.model_copy(update={"group_ranks": None}))
        try:
            objective = Objective(terms, providers, exchange, facts)
            _require_decoder(model, objective)
            if not images:
                _require_no_image(terms, providers)
            teacher = _drawn_outputs(model, objective, batch) if objective.needs.teacher_outputs else None
            objective.evaluate(_drawn_outputs(model, objective, batch), batch, teacher=teacher)
        except UserError as error:
            raise EveryRankError(str(error)) from None


def _embed_a_pair(model: DualEncoder) -> None:
    size, texts = model.image_spec.size, model.tokenizer(_WORDS[:1])
    embed: dict[str, Callable[[], Tensor]] = {
        "image": lambda: model.encode_image(torch.zeros(1, 3, size, size, dtype=torch.uint8)),
        "text": lambda: model.encode_text(texts.tokens, texts.lengths),
    }
    for name, forward in embed.items():
        try:
            embedding = forward()
        except (RuntimeError, IndexError, ValueError) as error:
            raise EveryRankError(f"model: the {name} tower cannot read its {name}s: {reason(error)}") from error
        if embedding.shape[1:] != (model.embed_dim,):
            raise EveryRankError(f"model: the {name} tower makes {list(embedding.shape)}, not [1, {model.embed_dim}]")
        if not bool(embedding.isfinite().all()):
            raise EveryRankError(f"model: the {name} tower makes embeddings that are no finite numbers")


def _require_no_image(terms: Mapping[str, Term], providers: Mapping[str, Provider]) -> None:
    named: dict[str, Term | Provider] = {
        **{f"objective.{name}": term for name, term in terms.items() if term.weight},
        **{f"providers.{name}": provider for name, provider in providers.items()},
    }
    for where, config in named.items():
        needs = config.needs()
        if "image" in needs.outputs | needs.teacher_outputs | needs.batch_parts:
            raise EveryRankError(f"{where}: it reads images, and the data brings none; set data.images to true")


def _require_decoder(model: DualEncoder, objective: Objective) -> None:
    for name, term in objective.terms.items():
        outputs = term.needs().outputs
        from_text = captioned_parts(outputs, "text")
        if model.decoder is None and (captioned_parts(outputs) or from_text):
            raise EveryRankError(f"objective.{name}: the model has no captioning decoder; set model.captioner")
        if model.embedding_tokens is None and from_text:
            raise EveryRankError(
                f"objective.{name}.sight: found text; the decoder looks at no embedding; set model.captioner.pooler to "
                "embedding"
            )


def _batch(num_pairs: int, *, labels: bool, captions: bool, images: bool, documents: bool) -> Batch:
    rows = torch.arange(num_pairs)
    texts = Texts(torch.stack([rows, rows + 1], dim=1), torch.full((num_pairs,), 2))
    pictures = Images(torch.zeros(num_pairs, 3, 1, 1, dtype=torch.uint8))
    parts: dict[str, BatchPart] = {"text": texts}
    if images:
        parts["image"] = pictures
    if captions:
        tokens, lengths, owners = (tensor.repeat_interleave(2, 0) for tensor in (texts.tokens, texts.lengths, rows))
        parts["captions"] = Texts(tokens, lengths, owners=owners)
    if documents:
        document = without_images(texts)
        parts |= {DOCUMENTS: replace(document, told=~document.told, owners=rows), DOCUMENT_IMAGES: pictures.take(0, 0)}
    keys = tuple(map(str, rows.tolist()))
    return Batch(0, rows, keys, parts, labels=rows // 2 if labels else None)


def _drawn_outputs(model: DualEncoder, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Drawn embeddings as the model would make them of a batch."""
    outputs = {
        name: functional.normalize(torch.randn(len(batch.owners(name)), model.embed_dim), dim=1)
        for name in sorted(objective.needs.outputs & batch.parts.keys())
    }
    if "captions" in outputs:
        outputs["text"] = outputs["captions"][::2]
    for sight in get_args(Sight):
        for part in captioned_parts(objective.needs.outputs, sight):
            texts = batch.parts.get(part)
            if isinstance(texts, Texts):
                outputs[likelihood_of(part, sight)] = -torch.rand(int((texts.lengths - 1).sum()), 2)
    outputs["logit_scale"] = torch.tensor([10.0])
    if model.logit_bias is not None:
        outputs["logit_bias"] = torch.tensor([-10.0])
    return outputs | {name: value.float() for name, value in objective.parameters().items()}
