"""The losses on pairs as functions of tensors, for anybody's own training loop.

Row i of `image` [rows, dim] and row i of `text` [rows, dim] are a pair; both have length 1, as a model of this project
makes them. `scale` [1] is the logit scale, 1 / temperature. On several ranks each gives its own rows, however many: all
pairs of all ranks are compared, and every function is a collective. A rank's result is world_size / N times the sum
over its own pairs, so that DistributedDataParallel's mean of the gradients is the gradient of one process on the whole
batch, and the mean of the results over the ranks is the loss.

`ids` [rows] are sample ids: pairs of one sample are no negatives of each other; None: all are of different samples.
`ranks` are those that are compared, and how (`Exchange(World.current(), SimilarityConfig(exchange="ring"))`); None: all
of the default process group, gathered. No [rows, all rows] matrix is ever made.

    from vlm.objectives import functional
    loss = functional.clip(image, text, scale)
    loss.backward()

Formulas, sources and what differs from the authors' code stand in the terms of the same names.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.batch import Batch
from vlm.objectives.contrast import contrast as _contrast
from vlm.objectives.pairs import pair_up
from vlm.objectives.rows import Rows, RowSamples
from vlm.objectives.state import TermState
from vlm.objectives.step import PairStep, StepRows
from vlm.objectives.term import PairTerm
from vlm.objectives.terms.alignment import alignment as _alignment
from vlm.objectives.terms.attract_repel import Sharpness
from vlm.objectives.terms.attract_repel import attract_repel as _attract_repel
from vlm.objectives.terms.clip import clip as _clip
from vlm.objectives.terms.continuous import Direction
from vlm.objectives.terms.continuous import continuous as _continuous
from vlm.objectives.terms.cross_correlation import cross_correlation as _cross_correlation
from vlm.objectives.terms.cyclic import cyclic as _cyclic
from vlm.objectives.terms.decoupled import decoupled as _decoupled
from vlm.objectives.terms.group_excluded import group_excluded as _group_excluded
from vlm.objectives.terms.hard import hard as _hard
from vlm.objectives.terms.multi_positive import Form
from vlm.objectives.terms.multi_positive import multi_positive as _multi_positive
from vlm.objectives.terms.ordering import ordering as _ordering
from vlm.objectives.terms.sigmoid import sigmoid as _sigmoid
from vlm.objectives.terms.supervised import supervised as _supervised
from vlm.objectives.terms.two_way import two_way
from vlm.objectives.terms.uniformity import uniformity as _uniformity
from vlm.outputs import Outputs
from vlm.similarity.exchange import Exchange

Embeddings = Float[Tensor, "rows dim"]
Scale = Float[Tensor, "1"]
Ids = Int64[Tensor, " rows"]
Loss = Float[Tensor, ""]


def clip(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    *,
    ids: Ids | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    ranks: Exchange | None = None,
) -> Loss:
    """The symmetric InfoNCE loss of CLIP (Radford et al., 2021); see `Clip`."""
    return _clip(pair_up(image, text, ids, ranks), scale, label_smoothing=label_smoothing, margin=margin)


def counting(
    image: Embeddings,
    text: Embeddings,
    counterfactual: Embeddings,
    *,
    scale: Scale | float = 1.0,
    ranks: Exchange | None = None,
) -> Loss:
    """The counting loss (Paiss et al., 2023) of images, texts, and the texts with another number; see `Counting`."""
    losses = two_way((image * text).sum(1), (image * counterfactual).sum(1), scale)
    ids = torch.arange(len(image), device=image.device)
    return RowSamples(ids, ranks or Exchange.current(image.device)).mean(losses)


def sigmoid(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    bias: Float[Tensor, "1"],
    *,
    ids: Ids | None = None,
    ranks: Exchange | None = None,
) -> Loss:
    """The sigmoid loss of SigLIP (Zhai et al., 2023) with a logit bias [1]; see `Sigmoid`."""
    return _sigmoid(pair_up(image, text, ids, ranks), scale, bias)


def decoupled(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    *,
    ids: Ids | None = None,
    sigma: float | None = None,
    detach_weights: bool = False,
    ranks: Exchange | None = None,
) -> Loss:
    """DCL, and with `sigma` DCLW (Yeh et al., 2022); see `Decoupled`."""
    return _decoupled(pair_up(image, text, ids, ranks), scale, sigma=sigma, detach_weights=detach_weights)


def hard(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    *,
    ids: Ids | None = None,
    hardest: float = 0.1,
    ranks: Exchange | None = None,
) -> Loss:
    """InfoNCE over each row's hardest negatives (Wang & Liu, 2021); see `Hard`."""
    return _hard(pair_up(image, text, ids, ranks), scale, hardest=hardest)


def group_excluded(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    groups: Ids,
    *,
    ids: Ids | None = None,
    ranks: Exchange | None = None,
) -> Loss:
    """InfoNCE without negatives of the own group [rows] (Chaitanya et al., 2020); see `GroupExcluded`."""
    return _group_excluded(pair_up(image, text, ids, ranks), scale, groups)


def multi_positive(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    groups: Ids,
    *,
    ids: Ids | None = None,
    form: Form = "log_sum",
    ranks: Exchange | None = None,
) -> Loss:
    """InfoNCE in which all of the own group [rows] are positives (Zhou et al., 2024); see `MultiPositive`."""
    return _multi_positive(pair_up(image, text, ids, ranks), scale, groups, form=form)


def supervised(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    groups: Ids,
    *,
    ids: Ids | None = None,
    ranks: Exchange | None = None,
) -> Loss:
    """SupCon over both modalities (Khosla et al., 2020) at a scale of 1 / T; see `Supervised`."""
    return _supervised(pair_up(image, text, ids, ranks), scale, groups)


def continuous(
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    queries: Float[Tensor, "rows other"],
    *,
    ids: Ids | None = None,
    direction: Direction = "y_to_x",
    sharpness: float = 1.0,
    threshold: float = 0.0,
    ranks: Exchange | None = None,
) -> Loss:
    """CWCL (Srinivasa et al., 2023), weighted by the similarities of `queries` [rows, other]; see `Continuous`."""
    return _continuous(
        pair_up(image, text, ids, ranks), scale, queries, direction=direction, sharpness=sharpness, threshold=threshold
    )


def alignment(
    image: Embeddings, text: Embeddings, *, ids: Ids | None = None, alpha: float = 2.0, ranks: Exchange | None = None
) -> Loss:
    """The mean distance of pairs to a power (Wang & Isola, 2020); see `Alignment`."""
    return _alignment(pair_up(image, text, ids, ranks), alpha=alpha)


def uniformity(
    image: Embeddings,
    text: Embeddings,
    *,
    ids: Ids | None = None,
    t: float = 2.0,
    x_factor: float = 0.5,
    y_factor: float = 0.5,
    cross_factor: float = 0.0,
    ranks: Exchange | None = None,
) -> Loss:
    """Logarithms of mean Gaussian potentials of images, texts, and across (Wang & Isola, 2020); see `Uniformity`."""
    return _uniformity(
        pair_up(image, text, ids, ranks), t=t, x_factor=x_factor, y_factor=y_factor, cross_factor=cross_factor
    )


def cyclic(
    image: Embeddings,
    text: Embeddings,
    *,
    ids: Ids | None = None,
    cross_modal: float = 0.25,
    in_modal: float = 0.25,
    ranks: Exchange | None = None,
) -> Loss:
    """The consistency terms of CyCLIP (Goel et al., 2022); see `Cyclic`."""
    return _cyclic(pair_up(image, text, ids, ranks), cross_modal=cross_modal, in_modal=in_modal)


def cross_correlation(
    image: Embeddings,
    text: Embeddings,
    *,
    ids: Ids | None = None,
    factor: float = 0.025,
    off_diagonal: float = 5e-3,
    standardize: bool = True,
    ranks: Exchange | None = None,
) -> Loss:
    """Barlow Twins between images and texts (Fini et al., 2023); see `CrossCorrelation`."""
    return _cross_correlation(
        pair_up(image, text, ids, ranks), factor=factor, off_diagonal=off_diagonal, standardize=standardize
    )


def ordering(
    image: Embeddings,
    text: Embeddings,
    *,
    ids: Ids | None = None,
    num_negatives: int = 10,
    steepness: float = 1.0,
    ranks: Exchange | None = None,
) -> Loss:
    """Group ordering by a sorting network (Shvetsova et al., 2023); see `Ordering`."""
    return _ordering(pair_up(image, text, ids, ranks), num_negatives=num_negatives, steepness=steepness)


def attract_repel(
    image: Embeddings,
    text: Embeddings,
    sharpness: Sharpness | None = None,
    *,
    groups: Ids | None = None,
    factors: tuple[float, float] = (1.0, 1.0),
    detach_weights: bool = False,
    ids: Ids | None = None,
    ranks: Exchange | None = None,
) -> Loss:
    """Contrastive attraction and repulsion (Zheng et al., 2021); see `AttractRepel`."""
    pairs = pair_up(image, text, ids, ranks)
    return _attract_repel(
        pairs, sharpness or Sharpness(), groups=groups, factors=factors, detach_weights=detach_weights
    )


def contrast(
    x: Float[Tensor, "x_rows dim"],
    y: Float[Tensor, "y_rows dim"],
    scale: Scale,
    *,
    x_ids: Int64[Tensor, " x_rows"],
    y_ids: Int64[Tensor, " y_rows"],
    ranks: Exchange | None = None,
) -> Loss:
    """InfoNCE between any two kinds of rows, several a sample or none: equal ids are positives; see `contrast`."""
    exchange = ranks or Exchange.current(x.device)
    return _contrast(Rows("x", x, RowSamples(x_ids, exchange)), Rows("y", y, RowSamples(y_ids, exchange)), scale)


def from_term(
    term: PairTerm,
    image: Embeddings,
    text: Embeddings,
    scale: Scale,
    *,
    bias: Float[Tensor, "1"] | None = None,
    ids: Ids | None = None,
    labels: Ids | None = None,
    teacher: Outputs | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    state: TermState | None = None,
    step: int = 0,
    seed: int = 0,
    ranks: Exchange | None = None,
) -> Loss:
    """The loss of any term on pairs, of those too that learn or remember (whitening, heads, global contrast, queues).

    `parameters` are what `term.parameters(facts)` began with, `state` is what `term.start(facts)` made: call its
    `commit()` after each update. `teacher` holds a teacher's `image` and `text`. Draws depend on seed, step and ids.
    """
    exchange = ranks or Exchange.current(image.device)
    samples = pair_up(image, text, ids, exchange).ids
    batch = Batch(step, samples, ("",) * len(samples), {}, labels)
    outputs = {"image": image, "text": text, "logit_scale": scale, **({} if bias is None else {"logit_bias": bias})}
    rows = StepRows(outputs, batch, exchange, term.needs().gathered)
    pairs = rows.pairs(("image", "text"))
    return term(PairStep(batch, outputs, rows, pairs, exchange, seed, teacher or {}, state, parameters or {}))
