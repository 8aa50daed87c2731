"""ALBEF's contrastive loss: keys from the teacher, and targets that the teacher softens."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.providers.queue import EmbeddingQueue, all_ranks, teacher_keys
from vlm.objectives.registry import TERMS
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import row_log_sum_exp
from vlm.similarity.soft_targets import SoftmaxTargets, target_sums
from vlm.similarity.tiles import Columns


@TERMS.register("momentum_distillation")
class MomentumDistillation(PairTerm):
    """Image-text contrast with momentum distillation (ALBEF: Li et al., 2021, equations 1 and 6).

    With x, y the model's embeddings and x', y' the teacher's, keys K being the teacher's embeddings of the batch of all
    ranks followed by a queue of those of past steps, and a the logit scale:

        t_ij = alpha softmax_j(a <x'_i, y'_j>) + (1 - alpha) [i = j]                 j over K, without gradient
        value = 1/(2N) sum_i [ - sum_j t_ij log softmax_j(a <x_i, y'_j>) - (the same of y_i over images x'_j) ]

    As in the authors' code the teacher's part is a cross-entropy; equation 6 has the KL divergence, which is less by
    the entropy of the targets: another value, the same gradient. alpha grows linearly from 0 over the first
    `ramp_epochs`. Keys carry no gradient; the scale learns. The one-hot part is a row's own pair alone: another row, or
    an entry of the queue, of the same sample counts as any other key, and
    the teacher's part is what finds it. The queue begins empty and costs 8 `queue_size` dim bytes on every rank.
    """

    alpha: float = Field(default=0.4, ge=0, le=1, description="share of the teacher's softmax in the targets")
    ramp_epochs: float = Field(
        default=1.0, ge=0, le=1e6, description="epochs over which alpha grows from 0; 0: at once"
    )
    queue_size: int = Field(
        default=65536, ge=0, le=2**26, description="past keys of each modality; 0: those of the batch alone"
    )

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), teacher_outputs=frozenset(self.between))

    def start(self, facts: RunFacts) -> TermState:  # noqa: D102
        return DistillationState(self.queue_size, facts, self.ramp_epochs * facts.steps_per_epoch)

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        state, pairs = step.state, step.pairs
        assert isinstance(state, DistillationState)
        everyone = all_ranks(pairs)
        proposed = teacher_keys(step, everyone)
        state.propose(proposed)
        batch = proposed if everyone is pairs.ranks else teacher_keys(step, pairs.ranks)
        past = state.keys
        all_x = torch.cat([batch.image, past.image.to(batch.image)])
        all_y = torch.cat([batch.text, past.text.to(batch.text)])
        alpha = self.alpha * state.progress(step.step)
        x_teacher, y_teacher = step.teacher_rows(pairs.x_rows), step.teacher_rows(pairs.y_rows)
        x_losses = _cross_entropy(step, _Side(pairs.x, x_teacher, y_teacher, all_y), alpha)
        y_losses = _cross_entropy(step, _Side(pairs.y, y_teacher, x_teacher, all_x), alpha)
        return pairs.mean((x_losses + y_losses) / 2)


class DistillationState(EmbeddingQueue):
    """The keys of past steps, and how long the teacher's share grows."""

    def __init__(self, size: int, facts: RunFacts, ramp_steps: float) -> None:
        super().__init__(size, facts)
        self._ramp_steps = ramp_steps

    def progress(self, step: int) -> float:
        """How much of alpha counts in a step, 0 to 1."""
        return min(1.0, step / self._ramp_steps) if self._ramp_steps else 1.0


class _Side(NamedTuple):
    """One direction: this rank's queries, the teacher's view of them, their own keys, and all keys."""

    queries: Tensor
    teacher: Tensor
    partner_keys: Tensor
    keys: Tensor


def _cross_entropy(step: PairStep, side: _Side, alpha: float) -> Float[Tensor, " rows"]:
    """-log softmax of a query's own key, and alpha times what its logit is above the mean under the teacher's softmax.

    As -sum_j t_j log p_j = log sum_j exp(z_j) - z_i + alpha (z_i - sum_j softmax_j(z') z_j).
    """
    scale, dtype = step.logit_scale, step.pairs.matmul_dtype
    keys = Columns(side.keys)
    places = torch.arange(len(side.keys), device=side.keys.device)
    others = EqualKeys(places[step.pairs.ranks.local], places)
    pair_logit = scale * (side.queries * side.partner_keys).sum(1)
    losses = -logsigmoid(pair_logit - row_log_sum_exp(side.queries, keys, scale, (others,), matmul_dtype=dtype))
    if not alpha:
        return losses
    fixed = scale.detach()
    with torch.no_grad():
        row_lse = row_log_sum_exp(side.teacher, keys, fixed, matmul_dtype=dtype)
    targets = SoftmaxTargets(side.teacher * fixed, side.keys, row_lse, row_lse.new_zeros(len(side.keys)))
    softened = target_sums(side.queries, keys, targets, with_columns=False, matmul_dtype=dtype)
    return losses + alpha * (pair_logit - scale * softened.rows)
