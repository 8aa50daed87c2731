"""Which charts a report shows, of one run or of several."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.figures import is_count, is_share, split_direction, spoken_name, spoken_value
from eval.plots import Series, line_chart
from eval.run_record import Point, RunRecord

_LEFT_OUT_OF_COMPARISONS = (
    "top5",
    "image_to_text_r@5",
    "image_to_text_r@10",
    "text_to_image_r@5",
    "text_to_image_r@10",
)


@dataclass(frozen=True)
class Chart:
    """A titled chart; the legend gives each line's colour, name and last value, `axis` the words below."""

    title: str
    legend: list[tuple[int, str, str]]
    svg: Markup
    axis: str


@dataclass(frozen=True)
class _Quantity:
    key: str
    title: str
    smooth: bool = False
    from_zero: bool = False
    value_format: Callable[[float], str] = "{:.4g}".format


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


_QUANTITIES = (
    _Quantity("logit_scale", "Logit scale"),
    _Quantity("lr", "Learning rate"),
    _Quantity("grad_norm", "Gradient norm", smooth=True),
    _Quantity("samples_per_second", "Samples a second", smooth=True, from_zero=True, value_format="{:,.0f}".format),
    _Quantity("data_wait", "Time spent waiting for data", smooth=True, from_zero=True, value_format=_percent),
)


def training_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss, each of its terms where there are several, and what else was logged with each step."""
    terms = list(dict.fromkeys(term for run in runs for term in run.terms))
    quantities = [_Quantity("loss", "Loss", smooth=True)]
    if len(terms) > 1:
        quantities += [_Quantity(term, f"Loss term: {term.replace('_', ' ')}", smooth=True) for term in terms]
    shares = list(dict.fromkeys(share for run in runs for share in run.data_shares))
    mixes = [_Quantity(share, _title_of_share(share), value_format=_percent) for share in _shares_of_several(shares)]
    charts = [_training_chart(quantity, names, runs) for quantity in (*quantities, *_QUANTITIES, *mixes)]
    return [chart for chart in charts if chart is not None]


def _shares_of_several(shares: Sequence[str]) -> list[str]:
    """Those of kinds with more than one member: a share that is always the whole says nothing."""
    kinds = Counter(share.rpartition("/")[0] for share in shares)
    return [share for share in shares if kinds[share.rpartition("/")[0]] > 1]


def _title_of_share(share: str) -> str:
    _, kind, name = share.split("/", 2)
    return f"Share of samples from {name}" if kind == "source" else f"Share of {kind}s from {name}"


def evaluation_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """Evaluations over steps, where one was made more than once.

    One run: the shares of an evaluation that belong together in one chart. Several runs: a chart for each metric.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.evaluations))
    keys = [key for key in keys if not is_count(_metric(key))]
    if len(runs) > 1:
        groups = [[key] for key in keys if _metric(key) not in _LEFT_OUT_OF_COMPARISONS]
    else:
        groups = list(_together(keys).values())
    charts = [_evaluation_chart(group, names, runs) for group in groups]
    return [chart for chart in charts if chart is not None]


def _together(keys: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """The keys that share a chart: those of one evaluation and direction, shares apart from the rest."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        direction, measure = split_direction(_metric(key))
        together = direction if direction and is_share(measure) else "" if is_share(measure) else measure
        groups.setdefault((key.rpartition("/")[0], together), []).append(key)
    return groups


def _training_chart(quantity: _Quantity, names: Sequence[str], runs: Sequence[RunRecord]) -> Chart | None:
    axis = common_axis(runs)
    lines = [
        Series(name, along(run, run.curve(quantity.key), axis), number)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    svg = line_chart(lines, smooth=quantity.smooth, from_zero=quantity.from_zero, value_format=quantity.value_format)
    legend = [
        (line.colour, line.label if len(runs) > 1 else "", quantity.value_format(line.points[-1][1])) for line in lines
    ]
    return Chart(quantity.title, legend, Markup(svg), words_of_axis(axis))


def _evaluation_chart(keys: Sequence[str], names: Sequence[str], runs: Sequence[RunRecord]) -> Chart | None:
    axis = common_axis(runs)
    evaluation, metric = keys[0].rpartition("/")[0], _metric(keys[0])
    if len(runs) > 1:
        lines = [
            Series(name, along(run, run.evaluations.get(keys[0], ()), axis), number)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
        title = f"{evaluation}: {spoken_name(metric)}"
        metrics = [metric] * len(runs)
    else:
        points = [along(runs[0], runs[0].evaluations[key], axis) for key in keys]
        metrics = [_metric(key) for key in keys]
        shared, labels = _shared_words(metrics)
        lines = [Series(label, p, n) for n, (label, p) in enumerate(zip(labels, points, strict=True))]
        title = f"{evaluation}: {shared}" if shared else evaluation
    if all(len(line.points) < 2 for line in lines):
        return None
    drawn = [line for line in lines if line.points]
    svg = line_chart(drawn, value_format=_percent, most=1.0) if is_share(metric) else line_chart(drawn)
    legend = [
        (line.colour, line.label, spoken_value(name, line.points[-1][1]))
        for name, line in zip(metrics, lines, strict=True)
        if line.points
    ]
    return Chart(title, legend, Markup(svg), words_of_axis(axis))


def _shared_words(metrics: Sequence[str]) -> tuple[str, list[str]]:
    """What the metrics of one chart have in common, their direction or their measure, and what tells them apart."""
    directions, measures = zip(*(split_direction(metric) for metric in metrics), strict=True)
    if len(set(directions)) == 1:
        return spoken_name(directions[0]), [spoken_name(measure) for measure in measures]
    return spoken_name(measures[0]), [spoken_name(direction) for direction in directions]


def common_axis(runs: Sequence[RunRecord]) -> str:
    """What runs are drawn along: "step", or "samples" where their global batches differ."""
    sizes = {run.training[-1]["samples"] / run.training[-1]["step"] for run in runs if run.training}
    return "step" if len(sizes) <= 1 else "samples"


def words_of_axis(axis: str) -> str:
    """What stands below a chart."""
    return "step" if axis == "step" else "samples seen"


def along(run: RunRecord, points: Sequence[Point], axis: str) -> list[Point]:
    """A run's points along the axis that runs have in common."""
    if axis == "step" or not run.training:
        return list(points)
    batch = run.training[-1]["samples"] / run.training[-1]["step"]
    return [(round(step * batch), value) for step, value in points]


def _metric(key: str) -> str:
    return key.rpartition("/")[2]
