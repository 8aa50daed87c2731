"""The two clouds of embeddings: how wide each is, and how far they lie apart."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_HELD_OUT = 5  # of so many pairs one is held out from the classifier
_RIDGE = 1e-3  # of the mean variance of a dimension


def figures_of_clouds(
    image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"]
) -> tuple[dict[str, float], dict[str, Float[Tensor, " components"]]]:
    """Figures of pairs of unit rows, by name, and each modality's `spectrum`."""
    distance, cosine = centroid_gap(image, text)
    figures = {
        "alignment": alignment(image, text),
        "uniformity_image": uniformity(image, image),
        "uniformity_text": uniformity(text, text),
        "uniformity_cross": uniformity(image, text),
        "centroid_gap": distance,
        "centroid_cosine": cosine,
        "distribution_gap": distribution_gap(image, text),
        "separability": separability(image, text),
    }
    spectra = {"image": spectrum(image), "text": spectrum(text)}
    for name, components in spectra.items():
        figures[f"effective_rank_{name}"] = effective_rank(components)
        figures[f"participation_ratio_{name}"] = participation_ratio(components)
        figures[f"first_component_{name}"] = float(components[0])
    return figures, spectra


def alignment(image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"]) -> float:
    """mean |x_i - y_i|^2 of unit rows: 0 where pairs are one, 4 where they are antipodes (Wang & Isola, 2020)."""
    return float((image - text).square().sum(1).mean())


def uniformity(rows: Float[Tensor, "rows dim"], others: Float[Tensor, "rows dim"], t: float = 2.0) -> float:
    """log mean_{i != j} exp(-t |u_i - v_j|^2) of unit rows, from 0 (one point) to -4t (Wang & Isola, 2020).

    The same rows twice give a modality's uniformity, images and texts the cross-modal one. NaN for fewer than two rows.
    """
    exponents = 2 * t * (rows @ others.T) - 2 * t
    exponents.fill_diagonal_(-math.inf)
    count = len(rows) * (len(rows) - 1)
    return float(exponents.flatten().logsumexp(0)) - math.log(count) if count else math.nan


def centroid_gap(image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"]) -> tuple[float, float]:
    """The distance |mean x - mean y| of the centroids, and the cosine between them (Liang et al., 2022)."""
    centre, other = image.mean(0), text.mean(0)
    return float((centre - other).norm()), float(torch.nn.functional.cosine_similarity(centre, other, dim=0))


def distribution_gap(image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"]) -> float:
    """The Frechet distance of two normal distributions with the clouds' means m and covariances S.

    sqrt( |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) )

    (Dowson & Landau, 1982, equation 16; squared, it is the distance of Heusel et al., 2017.) With centred rows A, B of
    n points each, S = A^T A / n, the last trace is the nuclear norm of A B^T over n, which needs no root of a matrix
    and no full rank; triangular factors of A and B have the same one, and the smaller side's size.
    """
    a, b = image - image.mean(0), text - text.mean(0)
    (_, root_a), (_, root_b) = (torch.linalg.qr(rows, mode="r") for rows in (a, b))
    between_centres = (image.mean(0) - text.mean(0)).square().sum()
    spreads = (a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()) / len(a)
    return float((between_centres + spreads.clamp(min=0)).sqrt())


def separability(image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"]) -> float:
    """The share of held-out embeddings whose modality a linear classifier tells: 1.0 separable, 0.5 chance.

    Every fifth pair is held out; the classifier is a ridge regression of +-1 on the others, with an intercept. (Fahim
    et al., 2024, fit a logistic regression; this has a closed form.) NaN for fewer than five pairs.
    """
    held_out = torch.arange(len(image), device=image.device) % _HELD_OUT == _HELD_OUT - 1
    if not bool(held_out.any()):
        return math.nan
    known, signs = _labelled(image[~held_out], text[~held_out])
    centre = known.mean(0)
    covariance = (known - centre).T @ (known - centre) / len(known)
    ridge = _RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    covariance.diagonal().add_(ridge)
    direction = torch.linalg.solve(covariance, (known - centre).T @ signs)
    held_out_rows, labels = _labelled(image[held_out], text[held_out])
    return float((((held_out_rows - centre) @ direction).sign() == labels).double().mean())


def spectrum(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, " components"]:
    """The share of the variance that each principal component explains, largest first; zeros where all rows are one."""
    variances: Tensor = torch.linalg.svdvals(rows - rows.mean(0)).square()
    total = variances.sum()
    # What the mean's rounding leaves of one point is no direction.
    is_point = total <= 16 * torch.finfo(rows.dtype).eps ** 2 * rows.square().sum()
    return torch.where(is_point, 0.0, variances / total)


def effective_rank(components: Float[Tensor, " components"]) -> float:
    """exp of the entropy of the shares of `spectrum` (Roy & Vetterli, 2007, of covariances): how many directions."""
    return float(torch.special.entr(components).sum().exp()) if bool(components.any()) else 0.0


def participation_ratio(components: Float[Tensor, " components"]) -> float:
    """(sum l)^2 / sum l^2 of the shares of `spectrum`: as many as there are equal directions."""
    return float(1 / components.square().sum()) if bool(components.any()) else 0.0


def tolerance(rows: Float[Tensor, "rows dim"], labels: Int64[Tensor, " rows"]) -> float:
    """The mean cosine of different unit rows of one class (Wang & Liu, 2021); NaN where no class has two rows."""
    same = (labels[:, None] == labels).fill_diagonal_(False)
    return float((rows @ rows.T)[same].mean())


def _labelled(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds in one, with +1 for an image and -1 for a text."""
    ones = image.new_ones(len(image))
    return torch.cat([image, text]), torch.cat([ones, -ones])
