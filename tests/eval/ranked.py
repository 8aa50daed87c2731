"""The figures of images whose class has a known place."""

from collections.abc import Sequence


def figures_of(ranks: Sequence[int], labels: Sequence[int], *, num_skipped: int = 0) -> dict[str, float]:
    """Those of a labelled evaluation by the place of each image's class, the first of which is 1."""
    recalls = [
        [rank == 1 for rank, other in zip(ranks, labels, strict=True) if other == label]
        for label in sorted(set(labels))
    ]
    return {
        "top1": sum(rank <= 1 for rank in ranks) / len(ranks),
        "top5": sum(rank <= 5 for rank in ranks) / len(ranks),
        "mean_per_class_recall": sum(sum(hits) / len(hits) for hits in recalls) / len(recalls),
        "num_samples": len(ranks),
        "num_skipped": num_skipped,
    }
