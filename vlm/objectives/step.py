"""The input of a pair term: all outputs of a step on this rank, as rows of any kind and as pairs of two kinds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.batch import Batch, Texts
from vlm.errors import EveryRankError, UserError
from vlm.objectives.pairs import Pairs
from vlm.objectives.rows import JointGather, Rows, RowSamples
from vlm.objectives.state import TermState
from vlm.outputs import Outputs, is_shared
from vlm.similarity.exchange import Exchange

GroupKey = Literal["sample", "caption", "label"]
Between = tuple[str, str]


class StepRows:
    """The outputs of a step as rows, made when first asked for and shared by all terms.

    `gathered` names the kinds that are fetched from all ranks together (those that the enabled terms need).
    """

    def __init__(self, outputs: Outputs, batch: Batch, exchange: Exchange, gathered: frozenset[str]) -> None:
        self._outputs, self._batch, self._exchange = outputs, batch, exchange
        per_sample = {
            kind: values
            for kind, values in outputs.items()
            if not is_shared(kind) and self._owners(kind) is None and values.ndim == 2
        }
        self._samples = RowSamples(batch.sample_ids, exchange)
        self._together = JointGather(self._samples, per_sample, gathered)
        self._rows: dict[str, Rows] = {}
        self._pairs: dict[Between, Pairs] = {}

    def __getitem__(self, kind: str) -> Rows:
        """The rows of an output. Collective where they are not one a sample."""
        if kind not in self._rows:
            values, owners = self._outputs[kind], self._owners(kind)
            if owners is None:
                self._rows[kind] = Rows(kind, values, self._samples, self._together)
            else:
                self._rows[kind] = Rows(kind, values, RowSamples(self._batch.sample_ids[owners], self._exchange))
        return self._rows[kind]

    def pairs(self, between: Between) -> Pairs:
        """Two kinds side by side, of the samples that have both.

        Raises UserError where a sample has several rows of a kind.
        """
        if between not in self._pairs:
            x, y = (self[kind] for kind in between)
            self._pairs[between] = Pairs(x, y) if x.samples is y.samples else self._aligned(between)
        return self._pairs[between]

    def _aligned(self, between: Between) -> Pairs:
        owners = [self._batch.owners(kind) for kind in between]
        for kind, rows in zip(between, owners, strict=True):
            if bool((rows[1:] == rows[:-1]).any()):
                raise UserError(f"objective: {kind} has several rows a sample, and pairs take one; choose another term")
        index = [torch.isin(rows, others).nonzero()[:, 0] for rows, others in zip(owners, owners[::-1], strict=True)]
        samples = RowSamples(self._batch.sample_ids[owners[0][index[0]]], self._exchange)
        values = [self._outputs[kind][rows] for kind, rows in zip(between, index, strict=True)]
        together = JointGather(samples, dict(zip(between, values, strict=True)), ())
        x, y = (Rows(kind, values[i], samples, together, index[i]) for i, kind in enumerate(between))
        return Pairs(x, y)

    def _owners(self, kind: str) -> Tensor | None:
        part = self._batch.parts.get(kind)
        return None if part is None else part.owners


@dataclass(frozen=True)
class PairStep:
    """One step on this rank as a pair term or provider sees it.

    `pairs` are the two kinds that the term is `between`, with what its providers add. `outputs` and `teacher` are the
    model's and the teacher's outputs by name; `state` and `parameters` are the term's own (or the provider's).
    """

    batch: Batch
    outputs: Outputs
    all_rows: StepRows
    pairs: Pairs
    exchange: Exchange
    seed: int = 0
    teacher: Outputs = field(default_factory=dict)
    state: TermState | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The number of the step, 0 being the first."""
        return self.batch.step

    @property
    def logit_scale(self) -> Float[Tensor, "1"]:
        """1 / temperature."""
        return self.outputs["logit_scale"]

    def rows(self, kind: str) -> Rows:
        """The rows of an output, of whatever kind: `image`, `text`, `captions`, ... Collective."""
        return self.all_rows[kind]

    def teacher_rows(self, rows: Rows) -> Float[Tensor, "rows dim"]:
        """The teacher's embeddings of these rows, without gradient."""
        values = self.teacher[rows.kind].detach()
        return values if rows.index is None else values[rows.index]

    def group_keys(self, by: GroupKey) -> Int64[Tensor, " rows"]:
        """A key for each pair; pairs with the same key belong together. Raises EveryRankError without labels."""
        if by == "sample":
            return self.pairs.ids
        keys = self._caption_keys() if by == "caption" else self.batch.labels
        if keys is None:
            raise EveryRankError(
                "objective: a term groups pairs by label, and not every sample has one (a `cls` file beside the image)"
            )
        index = self.pairs.x_rows.index
        return keys if index is None else keys[self.batch.owners(self.pairs.x_rows.kind)[index]]

    def _caption_keys(self) -> Int64[Tensor, " samples"]:
        texts: Texts = self.batch.texts
        return text_keys(texts.tokens, texts.lengths)


def pair_step(
    outputs: Outputs,
    batch: Batch,
    exchange: Exchange,
    *,
    between: Between = ("image", "text"),
    gathered: frozenset[str] = frozenset(),
    seed: int = 0,
    teacher: Outputs | None = None,
) -> PairStep:
    """The step of these outputs. Collective."""
    rows = StepRows(outputs, batch, exchange, gathered)
    return PairStep(batch, outputs, rows, rows.pairs(between), exchange, seed, teacher or {})


def text_keys(tokens: Int64[Tensor, "rows length"], lengths: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """A hash of each text's token ids, whatever it is padded to."""
    keys = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    for place in range(tokens.shape[1]):
        mixed = (keys ^ (tokens[:, place] + 1)) * 0x5851F42D4C957F2D + place
        keys = torch.where(place < lengths, mixed ^ (mixed >> 29), keys)
    return keys
