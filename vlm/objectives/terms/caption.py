"""Captioning: the likelihood of each token of a caption, given those before it and the image, or a text instead."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor

from vlm.batch import Batch, BatchPart, StandIns, Texts
from vlm.objectives.counter_rng import below, numbered, words
from vlm.objectives.local_part import LocalPart
from vlm.objectives.registry import TERMS
from vlm.objectives.term import LocalTerm, Needs
from vlm.outputs import PAIR, Sight, likelihood_of, stand_ins_of


@TERMS.register("caption")
class Caption(LocalTerm):
    """Mean over the global batch's tokens t of -log p(t | tokens before t, image) (CoCa: Yu et al., 2022, eq. 3).

    All tokens of a caption but its first are told, the end token among them, none of the padding. The mean is over
    tokens, not over captions; authors' and open_clip's code take that of each rank, which differs where ranks have
    unequal numbers. Label smoothing e is that of Szegedy et al., 2016: (1 - e) times the above, and e times the mean
    of -log p over the vocabulary.

    CoCa's weights are 1 for the contrastive loss, the *sum* of both directions in the paper, and 2 for this one.
    `clip` is the mean of both directions, as in open_clip, whose recipes have weights of 1 and 2 all the same.

    sight: text trains the decoder on texts alone (CLOSE: Gu et al., 2022): the embedding of a text, on its way to where
    images are (`model.captioner.gap`), stands in for that of the image. No image is read, and no embedding learns.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {"stand_in": ("sight", ("text",))}

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the uniform distribution in a label")
    captions: Literal["one", "all"] = Field(
        default="one", description="of a sample: the one that is its text, or all, which the data then has to bring"
    )
    sight: Sight = Field(
        default="image", description="what the decoder looks at: the image, or the embedding of a text in its place"
    )
    stand_in: Literal["same", "other"] = Field(
        default="same",
        description="the text that stands in: the caption that is told, or another one of its sample, drawn anew each "
        "time, where there is one (captions: all)",
    )

    @model_validator(mode="after")
    def _others_are_there(self) -> "Caption":
        if self.stand_in == "other" and self.captions != "all":
            raise ValueError(
                "stand_in: found other, for which the other captions of a sample are needed: captions: all"
            )
        return self

    @property
    def _part(self) -> str:
        return "text" if self.captions == "one" else "captions"

    def needs(self) -> Needs:
        """The tokens' likelihoods; with images, beside both embeddings."""
        pair = PAIR if self.sight == "image" else frozenset[str]()
        return Needs(outputs=pair | {likelihood_of(self._part, self.sight)}, batch_parts=frozenset({self._part}))

    def adds(self, batch: Batch, seed: int) -> dict[str, BatchPart]:
        """Which text stands in for each image, and a word to draw its noise from: keyed by seed, step and sample."""
        if self.sight == "image":
            return {}
        owners = batch.owners(self._part)
        counts = torch.bincount(owners, minlength=len(batch))
        places = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        draws = numbered(words(seed, batch.step, batch.sample_ids, "stand-in")[owners], places)
        offsets = torch.zeros_like(places)
        if self.stand_in == "other":
            offsets = _to_another(draws, places, counts[owners])
        return {stand_ins_of(self._part): StandIns(offsets, draws, owners=batch.parts[self._part].owners)}

    def count(self, batch: Batch) -> int:
        """The tokens that are told."""
        texts = batch.parts[self._part]
        assert isinstance(texts, Texts)
        return int((texts.lengths - 1).sum())

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the tokens of a micro-batch."""
        likelihood = part.outputs[likelihood_of(self._part, self.sight)].sum(0)
        loss: Tensor = -(1 - self.label_smoothing) * likelihood[0] - self.label_smoothing * likelihood[1]
        return loss


def _to_another(
    draws: Int64[Tensor, " rows"], places: Int64[Tensor, " rows"], counts: Int64[Tensor, " rows"]
) -> Int64[Tensor, " rows"]:
    """The way from each of a sample's `counts` rows to another one of them, each as likely; 0 where there is none."""
    others = (counts - 1).clamp(min=1)
    steps = 1 + below(draws, others, "other")
    return torch.where(counts > 1, (places + steps) % counts - places, 0)
