"""A rehearsal of the first step, before anything is written: what would be refused there is refused here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from vlm.batch import (
    COUNTERFACTUALS,
    DEGRADED,
    DOCUMENT_IMAGES,
    DOCUMENTS,
    Batch,
    BatchPart,
    Counterfactuals,
    DegradedImages,
    Images,
    Texts,
    editor_key,
)
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, nearest, reason
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


@dataclass(frozen=True)
class Brought:
    """What the data of a run brings to its objective: `editors` are those that make counterfactual captions."""

    labels: bool = False
    captions: bool = False
    images: bool = True
    documents: bool = False
    degraded: bool = False
    editors: frozenset[str] = frozenset()


@torch.no_grad()
def rehearse(
    model: DualEncoder,
    terms: Mapping[str, Term],
    providers: Mapping[str, Provider],
    similarity: SimilarityConfig,
    *,
    num_pairs: int,
    brought: Brought,
) -> None:
    """Embed one pair, and evaluate an objective like the run's on some drawn embeddings. Changes nothing.

    The cost is one forward of one pair.

    Raises:
        EveryRankError: a tower cannot read what data will give it, or a term misses something in model or data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _embed_a_pair(model)
        batch = _batch(min(num_pairs, _MOST_PAIRS), brought)
        facts = RunFacts(model.embed_dim, len(batch), 1, 1, 0, World())
        exchange = Exchange(World(), similarity.model_copy(update={"group_ranks": None}))
        try:
            objective = Objective(terms, providers, exchange, facts)
            _require_decoder(model, objective)
            _require_editors(objective, brought.editors)
            if not brought.images:
                _require_no_image(objective)
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


def _require_no_image(objective: Objective) -> None:
    for where, config in objective.parts.items():
        needs = config.needs()
        if "image" in needs.outputs | needs.teacher_outputs | needs.batch_parts:
            raise EveryRankError(f"{where}: it reads images, and the data brings none; set data.images to true")


def _require_editors(objective: Objective, editors: frozenset[str]) -> None:
    for where, config in objective.parts.items():
        for name in getattr(config, "editors", None) or ():
            if editors and name not in editors:  # without any, the batch has no counterfactuals at all
                raise EveryRankError(
                    f"{where}.editors: data.counterfactuals has no editor {name!r}; {nearest(name, editors)}"
                )


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


def _batch(num_pairs: int, brought: Brought) -> Batch:
    rows = torch.arange(num_pairs)
    texts = Texts(torch.stack([rows, rows + 1], dim=1), torch.full((num_pairs,), 2))
    pictures = Images(torch.zeros(num_pairs, 3, 1, 1, dtype=torch.uint8))
    parts: dict[str, BatchPart] = {"text": texts}
    if brought.images:
        parts["image"] = pictures
    if brought.captions:
        tokens, lengths, owners = (tensor.repeat_interleave(2, 0) for tensor in (texts.tokens, texts.lengths, rows))
        parts["captions"] = Texts(tokens, lengths, owners=owners)
    if brought.editors:
        keys = torch.tensor([editor_key(name) for name in sorted(brought.editors)])
        editors = keys[rows % len(keys)]
        parts[COUNTERFACTUALS] = Counterfactuals(texts.tokens + 1, texts.lengths, editors, owners=rows)
    if brought.degraded:
        parts[DEGRADED] = DegradedImages(pictures.pixels, torch.ones(num_pairs), owners=rows)
    if brought.documents:
        document = without_images(texts)
        parts |= {DOCUMENTS: replace(document, told=~document.told, owners=rows), DOCUMENT_IMAGES: pictures.take(0, 0)}
    labels = rows // 2 if brought.labels else None
    return Batch(0, rows, tuple(map(str, rows.tolist())), parts, labels=labels)


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
