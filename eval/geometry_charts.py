"""The charts of the geometry of embeddings in training: figures over steps, and scores at some moments."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from eval.charts import Chart, along, common_axis, words_of_axis
from eval.figures import four_digits
from eval.plots import Moment, Series, line_chart, ridge_chart
from eval.run_record import RunRecord
from vlm.geometry.names import HARDEST_SCORES, POSITIVE_SCORES

# Of one run, figures that belong together share a chart; of several, each has its own.
_CHARTS: Mapping[str, Mapping[str, str]] = {
    "Gap of the centroids": {"centroid_gap": "distance"},
    "Distance of the distributions": {"distribution_gap": "Fréchet distance"},
    "Modality told by a linear classifier": {"separability": "share"},
    "Alignment": {"alignment": "mean squared distance of pairs"},
    "Uniformity": {"uniformity_image": "images", "uniformity_text": "texts", "uniformity_cross": "across"},
    "Effective rank": {"effective_rank_image": "images", "effective_rank_text": "texts"},
    "Entropy of the negatives' weights": {"hardness_entropy": "nats"},
    "Weight of the hardest negative": {"hardest_negative_weight": "share"},
    "Tolerance": {"tolerance_image": "images", "tolerance_text": "texts"},
}
_MOST_MOMENTS = 6


def geometry_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """Each figure over steps, then for each run the scores of positives and of hardest negatives at some moments."""
    axis = common_axis(runs)
    charts = []
    for title, figures in _CHARTS.items():
        if len(runs) == 1:
            charts.append(_chart(title, [(runs[0], key, label) for key, label in figures.items()], axis))
            continue
        for key, label in figures.items():
            chart_title = f"{title}: {label}" if len(figures) > 1 else title
            charts.append(_chart(chart_title, [(run, key, name) for name, run in zip(names, runs, strict=True)], axis))
    charts += [_scores(name if len(runs) > 1 else "", run) for name, run in zip(names, runs, strict=True)]
    return [chart for chart in charts if chart is not None]


def _chart(title: str, figures: Sequence[tuple[RunRecord, str, str]], axis: str) -> Chart | None:
    """A line for each run and figure that was observed more than once."""
    lines = [
        Series(label, along(run, run.geometry.get(key, ()), axis), number)
        for number, (run, key, label) in enumerate(figures)
    ]
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return None
    legend = [(line.colour, line.label, four_digits(line.points[-1][1])) for line in lines]
    return Chart(title, legend, Markup(line_chart(lines)), words_of_axis(axis))


def _scores(name: str, run: RunRecord) -> Chart | None:
    """Histograms of cosines, one moment below the other."""
    positives, hardest = (run.histograms.get(key, {}) for key in (POSITIVE_SCORES, HARDEST_SCORES))
    steps = sorted(positives.keys() & hardest.keys())
    if not steps:
        return None
    shown = [steps[place * (len(steps) - 1) // max(1, _MOST_MOMENTS - 1)] for place in range(_MOST_MOMENTS)]
    moments = [Moment(step, (positives[step], hardest[step])) for step in dict.fromkeys(shown)]
    title = "Scores of positives and of hardest negatives"
    legend = [(0, "positives", ""), (1, "hardest negatives", "")]
    return Chart(f"{title}: {name}" if name else title, legend, Markup(ridge_chart(moments)), "cosine, by step")
