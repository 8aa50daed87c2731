"""What a term reads: this rank's pairs, the columns of the whole batch, and the negatives that providers add."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.batch import Batch
from vlm.errors import EveryRankError
from vlm.objectives.state import TermState
from vlm.outputs import Outputs
from vlm.similarity.collectives import RowGroup
from vlm.similarity.entries import EntryWeights, EqualKeys
from vlm.similarity.exchange import Exchange
from vlm.similarity.log_sum_exp import log_sum_exp, paired_log_sum_exp
from vlm.similarity.softplus_sum import paired_softplus_sum, softplus_sum
from vlm.similarity.tiles import Columns

Modality = Literal["image", "text"]


class ExtraNegatives(ABC):
    """Negatives beside those of the batch: a queue, mixtures, counterfactual texts. They carry no gradient.

    `others` says which modality the negatives are of: images are compared with extra texts, texts with extra images.
    Queries are this rank's rows; entries of the query's own sample do not count.
    """

    @abstractmethod
    def num_columns(self, others: Modality) -> Int64[Tensor, " rows"]:
        """How many extra negatives each row has."""

    @abstractmethod
    def log_sum_exp(
        self, queries: Float[Tensor, "rows dim"], others: Modality, scale: Float[Tensor, " rows_or_1"]
    ) -> Float[Tensor, " rows"]:
        """log sum_j exp(scale_i <q_i, e_ij>) over a row's extra negatives; -inf where it has none."""

    @abstractmethod
    def softplus_sum(
        self,
        queries: Float[Tensor, "rows dim"],
        others: Modality,
        scale: Float[Tensor, "1"],
        bias: Float[Tensor, "1"],
    ) -> Float[Tensor, " rows"]:
        """sum_j softplus(scale <q_i, e_ij> + bias) over a row's extra negatives."""


@dataclass(frozen=True)
class Pairs:
    """One step's pairs as a term sees them: n of N on this rank, `ranks` those among which they are compared.

    Whatever is gathered is gathered once and shared by all terms; a gathered tensor's gradient returns to its owner
    summed over ranks. `extra` and `positive_spread` come from the providers attached to the term; `state` and
    `parameters` are the term's own (or, for a provider, its own).
    """

    outputs: Outputs
    batch: Batch
    exchange: Exchange
    ranks: RowGroup
    num_pairs: int  # of all ranks, those of other groups too
    seed: int = 0
    teacher: Outputs = field(default_factory=dict)
    extra: tuple[ExtraNegatives, ...] = ()
    positive_spread: Float[Tensor, " rows"] | None = None
    state: TermState | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    _gathered: "Gathered | None" = None

    @property
    def image(self) -> Float[Tensor, "rows dim"]:
        """This rank's image embeddings."""
        return self.outputs["image"]

    @property
    def text(self) -> Float[Tensor, "rows dim"]:
        """This rank's text embeddings."""
        return self.outputs["text"]

    @property
    def logit_scale(self) -> Float[Tensor, "1"]:
        """1 / temperature."""
        return self.outputs["logit_scale"]

    @property
    def ids(self) -> Int64[Tensor, " rows"]:
        """This rank's sample ids."""
        return self.batch.sample_ids

    @property
    def gathered(self) -> "Gathered":
        """What this step has gathered so far."""
        assert self._gathered is not None
        return self._gathered

    def embedded_as(
        self, image: Float[Tensor, "rows other"], text: Float[Tensor, "rows other"], needed: frozenset[str]
    ) -> "Pairs":
        """The same samples with other embeddings, of which `needed` will be gathered; without what providers add."""
        outputs = {**self.outputs, "image": image, "text": text}
        gathered = self.gathered.embedded_as(outputs, needed)
        return replace(self, outputs=outputs, extra=(), positive_spread=None, _gathered=gathered)

    def share(self, losses: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """This rank's share of the mean over the global batch of one number a pair."""
        return losses.sum() * (self.exchange.world.size / self.num_pairs)

    def share_of_group(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """This rank's share of a value that `ranks` have found together: its mean over groups, weighted by pairs."""
        own = self.ranks.counts[self.ranks.rank]
        return value * (own * self.exchange.world.size / self.num_pairs)

    def positive_similarity(self) -> Float[Tensor, " rows"]:
        """<x_i, y_i>, made harder by the providers: (2 l^2 - 2 l + 1) s + 2 l (1 - l) at a spread of l."""
        return self._spread_apart((self.image * self.text).sum(1), 1.0)

    def logits(
        self,
        scale: Float[Tensor, "1"],
        negatives: tuple[EntryWeights, ...] | None = None,
        of_text_negatives: tuple[EntryWeights, ...] | None = None,
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Of each own pair the logit of `positive_similarity`, and the log-sum-exps over both sides' negatives.

        Those are log sum_j exp(a <x_i, y_j>) of the image over texts, and of the text over images. Negatives are all
        entries of other samples, or those that `negatives` leaves, and what providers add; texts (columns) may have
        their own.
        """
        weights = self.gathered.other_samples if negatives is None else negatives
        columns, product = self.gathered.text_columns, self.exchange.product
        if columns.pairs_at is None:
            own = scale * (self.image * self.text).sum(1)
            of_images, parts = log_sum_exp(self.image, columns, scale, weights, of_text_negatives, product=product)
        else:
            own, of_images, parts = paired_log_sum_exp(
                self.image, columns, scale, weights, of_text_negatives, product=product
            )
        of_texts = self.ranks.merge_log_sum_exp(parts)
        for extra in self.extra:
            of_images = _log_add_exp(of_images, extra.log_sum_exp(self.image, "text", scale))
            of_texts = _log_add_exp(of_texts, extra.log_sum_exp(self.text, "image", scale))
        return self._spread_apart(own, scale), of_images, of_texts

    def softplus_logits(
        self, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Of each own pair the logit of `positive_similarity` without the bias, and the sum over its negatives.

        That is sum_j log(1 + exp(a <x_i, y_j> + b)) over the texts of other samples, and what providers add both ways.
        """
        arguments = (self.image, self.gathered.text_columns, scale, bias, self.gathered.other_samples)
        if self.gathered.text_columns.pairs_at is None:
            own = scale * (self.image * self.text).sum(1)
            negatives = softplus_sum(*arguments, product=self.exchange.product)
        else:
            own, negatives = paired_softplus_sum(*arguments, product=self.exchange.product)
        for extra in self.extra:
            negatives = negatives + extra.softplus_sum(self.image, "text", scale, bias)
            negatives = negatives + extra.softplus_sum(self.text, "image", scale, bias)
        return self._spread_apart(own, scale), negatives

    def _spread_apart(self, positive: Tensor, largest: Tensor | float) -> Tensor:
        """Similarities (`largest` 1) or logits (`largest` the scale) of pairs that are extrapolated apart."""
        if self.positive_spread is None:
            return positive
        spread = self.positive_spread
        return (2 * spread**2 - 2 * spread + 1) * positive + 2 * spread * (1 - spread) * largest


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), whose gradient is 0, not NaN, where neither has an entry."""
    some = ~torch.maximum(a, b).isneginf()
    return torch.where(some, torch.logaddexp(torch.where(some, a, 0.0), torch.where(some, b, 0.0)), float("-inf"))


class Gathered:
    """What all terms of a step share of other ranks' rows, fetched when first asked for.

    `needed` names the embeddings that are fetched in one collective (those the enabled terms declare).
    """

    def __init__(
        self, outputs: Outputs, batch: Batch, exchange: Exchange, ranks: RowGroup, needed: frozenset[str]
    ) -> None:
        self._outputs, self._batch, self._exchange, self._ranks = outputs, batch, exchange, ranks
        self._needed = needed
        self._embeddings: dict[str, Tensor] = {}

    def embedded_as(self, outputs: Outputs, needed: frozenset[str]) -> "Gathered":
        """The same samples with other embeddings; what says which samples they are is not fetched again."""
        other = Gathered(outputs, self._batch, self._exchange, self._ranks, needed)
        other.ids, other.other_samples = self.ids, self.other_samples
        return other

    @cached_property
    def ids(self) -> Int64[Tensor, " all"]:
        """All ranks' sample ids."""
        return self._ranks.gather_constant(self._batch.sample_ids)

    @cached_property
    def other_samples(self) -> tuple[EntryWeights, ...]:
        """Leaves all entries but those of the same sample."""
        return (EqualKeys(self._batch.sample_ids, self.ids),)

    @cached_property
    def text_columns(self) -> Columns:
        """All texts as columns, as the exchange delivers them."""
        if self._exchange.config.exchange == "ring":
            return self._exchange.columns(self._outputs["text"], self._ranks)
        return Columns(self.text, pairs_at=self._pairs_at)

    @cached_property
    def image_columns(self) -> Columns:
        """All images as columns, as the exchange delivers them."""
        if self._exchange.config.exchange == "ring":
            return self._exchange.columns(self._outputs["image"], self._ranks)
        return Columns(self.image, pairs_at=self._pairs_at)

    @property
    def _pairs_at(self) -> int | None:
        """Own rows among the gathered; None where a low-precision wire has rounded them on their way."""
        rounded = self._exchange.wire is not None and self._ranks.size > 1
        return None if rounded else self._ranks.own.start

    @property
    def image(self) -> Float[Tensor, "all dim"]:
        """All ranks' image embeddings."""
        return self._embedding("image")

    @property
    def text(self) -> Float[Tensor, "all dim"]:
        """All ranks' text embeddings."""
        return self._embedding("text")

    def _embedding(self, name: Modality) -> Tensor:
        if name not in self._embeddings:
            missing = sorted((self._needed | {name}) - self._embeddings.keys())
            parts: Sequence[Tensor] = [self._outputs[part] for part in missing]
            if self._ranks.size > 1:
                parts = self._ranks.gather(torch.cat(list(parts), dim=1), self._exchange.wire).chunk(
                    len(missing), dim=1
                )
            self._embeddings.update(zip(missing, parts, strict=True))
        return self._embeddings[name]


def gather_pairs(
    outputs: Outputs,
    batch: Batch,
    exchange: Exchange,
    *,
    needed: frozenset[str] = frozenset(),
    seed: int = 0,
    teacher: Outputs | None = None,
) -> Pairs:
    """The pairs of one step. Collective."""
    ranks, num_pairs = exchange.count(len(batch))
    gathered = Gathered(outputs, batch, exchange, ranks, needed)
    return Pairs(outputs, batch, exchange, ranks, num_pairs, seed=seed, teacher=teacher or {}, _gathered=gathered)


GroupKey = Literal["sample", "caption", "label"]


def group_keys(pairs: Pairs, by: GroupKey) -> Int64[Tensor, " rows"]:
    """A key for each own pair; pairs with the same key belong together. Raises EveryRankError without labels."""
    if by == "sample":
        return pairs.ids
    if by == "caption":
        return caption_keys(pairs.batch.texts.tokens, pairs.batch.texts.lengths)
    if pairs.batch.labels is None:
        raise EveryRankError(
            "objective: a term groups pairs by label, and not every sample has one (a `cls` file beside the image)"
        )
    return pairs.batch.labels


def caption_keys(tokens: Int64[Tensor, "rows length"], lengths: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """A hash of each caption's token ids, whatever it is padded to."""
    keys = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    for place in range(tokens.shape[1]):
        mixed = (keys ^ (tokens[:, place] + 1)) * 0x5851F42D4C957F2D + place
        keys = torch.where(place < lengths, mixed ^ (mixed >> 29), keys)
    return keys
