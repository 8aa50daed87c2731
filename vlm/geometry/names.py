"""The names that a run's geometry is written under, for whoever measures and whoever reports. Imports no torch."""

from collections.abc import Mapping

FIGURES: Mapping[str, str] = {
    "alignment": "mean squared distance of the two sides of a pair",
    "uniformity_image": "logarithm of the mean Gaussian potential of two images: low where they are spread out",
    "uniformity_text": "the same of two texts",
    "uniformity_cross": "the same of an image and a text of different pairs",
    "centroid_gap": "distance between the means of images and of texts",
    "centroid_cosine": "cosine of the means of images and of texts",
    "distribution_gap": "Frechet distance of images and texts",
    "separability": "accuracy of a linear classifier that tells images from texts",
    **{
        f"{figure}_{modality}": f"{description} of {modality}s"
        for figure, description in (
            ("effective_rank", "exponential of the entropy of the spectrum"),
            ("participation_ratio", "squared sum over sum of squares of the spectrum"),
            ("first_component", "the first principal component's part of the variance"),
            ("tolerance", "mean cosine within a class"),
        )
        for modality in ("image", "text")
    },
    "hardness_entropy": "entropy of the weights of the negatives, in nats",
    "hardest_negative_weight": "weight of the hardest negative",
}
"""The figures by name, and what each is."""
POSITIVE_SCORES, HARDEST_SCORES = "positive_scores", "hardest_negative_scores"
