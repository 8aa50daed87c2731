"""The line charts of a report, of one run or of several."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.figures import formatted, marked
from eval.plots import Series, line_chart
from eval.run_record import Point, RunRecord, metric_of
from vlm.metric import Metric


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
    _Quantity("patch_dropout", "Patches left out", from_zero=True, value_format=_percent),
    _Quantity("samples_per_second", "Samples a second", smooth=True, from_zero=True, value_format="{:,.0f}".format),
    _Quantity("data_wait", "Time spent waiting for data", smooth=True, from_zero=True, value_format=_percent),
)


def training_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss, each of its terms where there are several, and what else was logged with each step."""
    terms = list(dict.fromkeys(term for run in runs for term in run.terms))
    quantities = [_Quantity("loss", "Loss", smooth=True)]
    if len(terms) > 1:
        quantities += [_Quantity(term, f"Loss term: {term.replace('_', ' ')}", smooth=True) for term in terms]
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.data_fractions))
    mixes = [
        _Quantity(metric, _fraction_title(metric), value_format=_percent) for metric in _informative_metrics(metrics)
    ]
    charts = [_training_chart(quantity, names, runs) for quantity in (*quantities, *_QUANTITIES, *mixes)]
    return [chart for chart in charts if chart is not None]


def _informative_metrics(metrics: Sequence[str]) -> list[str]:
    """Those of kinds with more than one member: a fraction that is always 1 says nothing."""
    kinds = Counter(metric.rpartition("/")[0] for metric in metrics)
    return [metric for metric in metrics if kinds[metric.rpartition("/")[0]] > 1]


def _fraction_title(metric: str) -> str:
    _, kind, name = metric.split("/", 2)
    return f"Share of samples from {name}" if kind == "source" else f"Share of {kind}s from {name}"


def evaluation_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """Evaluations over steps, where one was made more than once.

    One run: the fractions of an evaluation that belong together in one chart. Several runs: a chart for each metric.
    """
    metrics = {key: metric_of(key, runs) for run in runs for key in run.evaluations}
    results = {key: metric for key, metric in metrics.items() if metric.unit != "count"}
    if len(runs) > 1:
        charts = [
            _comparison_chart(key, metric, names, runs)
            for key, metric in results.items()
            if metric.prominence != "detail"
        ]
    else:
        charts = [_evaluation_chart(group, runs[0]) for group in _charted_together(results)]
    return [chart for chart in charts if chart is not None]


def _charted_together(metrics: Mapping[str, Metric]) -> list[dict[str, Metric]]:
    """The metrics that share a chart: the fractions of one group of an evaluation, or one label in all groups."""
    charts: dict[tuple[str, str, bool], dict[str, Metric]] = {}
    for key, metric in metrics.items():
        is_fraction = metric.unit == "fraction"
        place = (key.rpartition("/")[0], metric.group if is_fraction else metric.label, is_fraction)
        charts.setdefault(place, {})[key] = metric
    return list(charts.values())


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


def _comparison_chart(key: str, metric: Metric, names: Sequence[str], runs: Sequence[RunRecord]) -> Chart | None:
    """One metric of several runs."""
    axis = common_axis(runs)
    lines = [
        (Series(name, along(run, run.evaluations.get(key, ()), axis), number), metric)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    return _metric_chart(f"{key.rpartition('/')[0]}: {marked(metric.title, metric)}", lines, axis)


def _evaluation_chart(metrics: Mapping[str, Metric], run: RunRecord) -> Chart | None:
    """Several metrics of one evaluation of a run."""
    axis = common_axis([run])
    heading, labels = _common_words(list(metrics.values()))
    lines = [
        (Series(label, along(run, run.evaluations[key], axis), number), metric)
        for number, (label, (key, metric)) in enumerate(zip(labels, metrics.items(), strict=True))
    ]
    evaluation = next(iter(metrics)).rpartition("/")[0]
    return _metric_chart(f"{evaluation}: {heading}" if heading else evaluation, lines, axis)


def _metric_chart(title: str, lines: Sequence[tuple[Series, Metric]], axis: str) -> Chart | None:
    """A chart of lines of metrics of one unit; None where none of them was measured more than once."""
    if all(len(line.points) < 2 for line, _ in lines):
        return None
    drawn = [(line, metric) for line, metric in lines if line.points]
    series = [line for line, _ in drawn]
    are_fractions = drawn[0][1].unit == "fraction"
    svg = line_chart(series, value_format=_percent, most=1.0) if are_fractions else line_chart(series)
    legend = [(line.colour, line.label, formatted(metric, line.points[-1][1])) for line, metric in drawn]
    return Chart(title, legend, Markup(svg), words_of_axis(axis))


def _common_words(metrics: Sequence[Metric]) -> tuple[str, list[str]]:
    """The words that the metrics of one chart have in common, group or label, and those that tell them apart.

    A metric alone has all its words in common.
    """
    if len(metrics) == 1:
        return marked(metrics[0].title, metrics[0]), [""]
    groups, labels = [metric.group for metric in metrics], [marked(metric.label, metric) for metric in metrics]
    if len(set(groups)) == 1:
        return groups[0], labels
    return labels[0], groups


def common_axis(runs: Sequence[RunRecord]) -> str:
    """The axis along which runs are drawn: "step", or "samples" where their global batches differ."""
    sizes = {run.training[-1]["samples"] / run.training[-1]["step"] for run in runs if run.training}
    return "step" if len(sizes) <= 1 else "samples"


def words_of_axis(axis: str) -> str:
    """The words below a chart."""
    return "step" if axis == "step" else "samples seen"


def along(run: RunRecord, points: Sequence[Point], axis: str) -> list[Point]:
    """A run's points along the axis that runs have in common."""
    if axis == "step" or not run.training:
        return list(points)
    batch = run.training[-1]["samples"] / run.training[-1]["step"]
    return [(round(step * batch), value) for step, value in points]
