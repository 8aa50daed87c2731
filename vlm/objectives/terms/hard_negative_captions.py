"""Captions that are almost right as negatives: among all texts (NegCLIP), or apart from their own by a margin."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.batch import COUNTERFACTUALS
from vlm.objectives.providers.counterfactual_negatives import (
    CounterfactualNegatives,
    FurtherTexts,
    of_editors,
    require_texts,
)
from vlm.objectives.registry import TERMS
from vlm.objectives.rows import RowSamples
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm, Provider
from vlm.objectives.terms.clip import clip
from vlm.objectives.terms.two_way import ScaleChoice, scale_of

_NUMBERS = ("number",)  # theirs is the term `counting`


@TERMS.register("hard_negative_captions")
class HardNegativeCaptions(PairTerm):
    """Losses on counterfactuals y'_k of captions (`data.counterfactuals`), each of one image of the global batch.

    among_texts: the loss of `clip` in which each image is compared with all texts and all counterfactuals of all ranks,
    and each text with all images (NegCLIP: Yuksekgonul et al., 2023). It stands in place of `clip`.

    margin: value = 1/K sum_k max(0, m - a (<x_k, y_k> - <x_k, y'_k>)) beside `clip`, over all K counterfactuals. With
    `largest_margin` m grows as the model learns: it is the mean of a (<x_k, y_k> - <x_k, y'_k>) over the step before,
    at least `margin` and at most `largest_margin` (the cross-modal rank loss of Zhang et al., CE-CLIP, 2024, who have
    the logit scale for a, and a largest margin of 10). Several editors may have a term, and so a margin, each.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "margin": ("form", ("margin",)),
        "largest_margin": ("form", ("margin",)),
        "scale": ("form", ("margin",)),
        "as_negatives": ("form", ("margin",)),
        "label_smoothing": ("form", ("among_texts",)),
    }

    form: Literal["among_texts", "margin"] = Field(
        default="among_texts", description="negatives among all texts (NegCLIP), or a margin to the own caption"
    )
    editors: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="editors whose counterfactuals count, by name; null: all but `number`"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="that of `clip`")
    margin: float = Field(default=0.0, ge=0, le=1e4, description="least difference that is asked for")
    largest_margin: float | None = Field(
        default=None, ge=0, le=1e4, description="limit of a margin that follows the model; null: it stays"
    )
    scale: ScaleChoice = Field(
        default="logit_scale", description="factor of the cosines: none, logit_scale (as a constant), or a number"
    )
    as_negatives: bool = Field(default=False, description="also show them to terms that take providers (`clip`)")

    @model_validator(mode="after")
    def _margins_are_ordered(self) -> "HardNegativeCaptions":
        if self.largest_margin is not None and self.largest_margin < self.margin:
            raise ValueError(f"largest_margin: found {self.largest_margin}, which is less than margin, {self.margin}")
        if self.form == "margin" and self.margin == 0 and self.largest_margin is None:
            raise ValueError("margin: found 0; a margin, or a largest_margin up to which it grows, is needed")
        return self

    def needs(self) -> Needs:
        """Both embeddings, and those of the counterfactuals."""
        outputs = frozenset({*self.between, COUNTERFACTUALS})
        gathered = frozenset(self.between[1:]) if self.form == "among_texts" else frozenset[str]()
        return Needs(outputs=outputs, gathered=gathered, batch_parts=frozenset({"text", COUNTERFACTUALS}))

    def provides(self) -> Mapping[str, Provider]:
        """The counterfactuals as further negatives, where that is wanted."""
        if not self.as_negatives:
            return {}
        return {"as_negatives": CounterfactualNegatives(editors=self.editors, besides=self._besides)}

    def start(self, facts: RunFacts) -> TermState | None:
        """The margin that follows the model."""
        return None if self.largest_margin is None else FollowingMargin(self.margin, self.largest_margin, facts)

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:
        """This rank's part of the loss."""
        chosen = of_editors(step.batch, self.editors, self._besides)
        if self.form == "among_texts":
            pairs = replace(step.pairs, extra=(FurtherTexts(step, chosen),))
            return clip(pairs, step.logit_scale, label_smoothing=self.label_smoothing)
        owners = step.batch.owners(COUNTERFACTUALS)[chosen]
        require_texts(self.between)
        image = step.outputs[next(kind for kind in self.between if kind != "text")][owners]
        text, negative = step.outputs["text"][owners], step.outputs[COUNTERFACTUALS][chosen]
        differences = scale_of(self.scale, step.outputs) * ((image * text).sum(1) - (image * negative).sum(1))
        margin = differences.new_tensor(self.margin)
        if isinstance(step.state, FollowingMargin):
            margin = step.state.margin.to(differences)
            step.state.propose(differences)
        samples = RowSamples(step.batch.sample_ids[owners], step.exchange)
        return samples.mean((margin - differences).clamp(min=0))

    @property
    def _besides(self) -> tuple[str, ...]:
        return _NUMBERS if self.editors is None else ()


class FollowingMargin(TermState):
    """The mean difference of true and false captions in the last step that had any, within limits."""

    def __init__(self, least: float, largest: float, facts: RunFacts) -> None:
        self._least, self._largest, self._world = least, largest, facts.world
        self.margin = torch.tensor([least], dtype=torch.float64, device=facts.world.device)
        self._proposed: Tensor | None = None

    def propose(self, differences: Float[Tensor, " rows"]) -> None:
        """Take the mean of these over all ranks when the step is committed. Collective."""
        found = differences.detach().double()
        self._proposed = self._world.sum(torch.stack([found.sum(), found.new_tensor(float(len(found)))]))

    def commit(self) -> None:  # noqa: D102
        if self._proposed is not None and self._proposed[1] > 0:
            self.margin = (self._proposed[:1] / self._proposed[1]).clamp(self._least, self._largest)
        self._proposed = None

    def proposal_check(self) -> Float[Tensor, ""] | None:  # noqa: D102
        return None if self._proposed is None else 0.0 * self._proposed.sum()

    def discard(self) -> None:  # noqa: D102
        self._proposed = None

    def replicated(self) -> dict[str, Tensor]:  # noqa: D102
        return {"margin": self.margin}

    def restore(self, replicated: dict[str, Tensor], local: list[dict[str, Tensor]]) -> None:  # noqa: D102, ARG002
        if replicated:
            self.margin = replicated["margin"].to(self.margin).clamp(self._least, self._largest)
