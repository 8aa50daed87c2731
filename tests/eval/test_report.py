"""The report: one file that needs nothing else, showing what the run measured and leaving out what it did not."""

import base64
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.report import run_names, write_report
from tests.data.small_shards import picture
from tests.eval.runs import declare, evaluated, logged, observed, write_examples, write_ledger, write_run
from vlm.errors import UserError
from vlm.evaluation import Metric

SCORES = {
    "zs/top1": 0.8125,
    "zs/num_samples": 1440,
    "ret/image_to_text_r@1": 0.475,
    "ret/image_to_text_median_rank": 2.0,
    "ret/text_to_image_r@1": 0.404,
    "ret/text_to_image_median_rank": 3.5,
    "ret/num_images": 1000,
}
_VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """The words, headings and tags of a page; fails on tags that do not close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def report(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def full_run(path: Path, caption: str = "a dog in the snow") -> Path:
    lines = [logged(step, 5.0 - step / 50) for step in range(10, 101, 10)]
    lines += [evaluated(50, {key: value / 2 for key, value in SCORES.items()}), evaluated(100, SCORES)]
    write_run(path, lines, torn='{"step": 110, "lo')
    write_ledger(path, ["it has no caption"] * 3)
    write_examples(path, "ret", caption)
    return path


def test_a_page_tells_what_ran_and_what_came_out(tmp_path: Path) -> None:
    page = report(tmp_path, full_run(tmp_path / "my-run"))
    for words in (
        "my-run",
        "100 steps, 3.2k samples · 1.235M parameters · started 2030-01-02 03:04",
        "top-1 81.2%",
        "image → text R@1 47.5%",
        "final loss 3",
        "samples a second 100",
        "image → text 47.5% 2 text → image 40.4% 3.5",
        "1,440 samples",
        "Logit scale 114 ",
        "Time spent waiting for data 25%",
        "rank 1 ",
        "rank 1,234",
        "and 1 more of its own",
        "a dog in the snow 0.62",
        "photos: it has no caption 3",
        "model ViT-B-32",
        "data photos: 6,000 samples in 4 shards",
        "engine zero2, 2 ranks, bf16",
        "machine Some CPU, 2 cores, 4 GiB, Linux",
        "torch 2.15.0",
        "seed: 3",
    ):
        assert words in page.text, words


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = report(tmp_path, full_run(tmp_path / "run"))
    text = (tmp_path / "page.html").read_text()
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert base64.b64encode(picture(0)).decode() in text


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>'
    run = full_run(tmp_path / "run", caption=nasty)
    (run / "recipe.yaml").write_text(f"note: '{nasty}'\n")
    page = report(tmp_path, run)
    assert "script" not in page.tags
    assert nasty in page.text


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("seed: 1\n")
    text = report(tmp_path, tmp_path / "begun").text
    assert "no step logged yet" in text
    assert "What ran" in text
    assert not re.search("Evaluation|Training [^r]|Retrievals|Skipped", text)
    early = report(tmp_path, write_run(tmp_path / "early", [logged(1, math.nan), evaluated(1, {"zs/top1": 0.5})]))
    assert "final loss nan" in early.text
    assert "top-1 50.0%" in early.text
    assert "Retrievals" not in early.text


def test_each_of_several_terms_has_a_chart(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run", [logged(n, 2.0, count_loss=0.5) for n in (1, 2)]))
    assert "Loss term: clip" in page.text
    assert "Loss term: count loss 0.5" in page.text
    assert "Loss term" not in report(tmp_path, full_run(tmp_path / "plain")).text


def test_shares_of_data_are_called_what_they_are_and_are_no_terms(tmp_path: Path) -> None:
    shares = {"data/source/web": 0.75, "data/source/photo": 0.25, "data/caption/alt/text": 1.0}
    page = report(tmp_path, write_run(tmp_path / "run", [logged(n, 2.0) | shares for n in (1, 2)]))
    assert "Share of samples from web 75%" in page.text
    assert "Share of samples from photo 25%" in page.text
    assert "alt/text" not in page.text  # all captions are from there
    assert "Loss term" not in page.text


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        (Metric("mae", "lower"), ["1"]),
        (Metric("accuracy_gap", "lower", unit="fraction"), ["100.0%"]),  # whatever its name says
        (Metric("rank_correlation", "higher"), ["2"]),
        (Metric("top1_spread"), []),
        (None, []),  # nobody said what it is
    ],
)
def test_the_best_run_is_the_one_that_the_evaluator_calls_better(
    tmp_path: Path, metric: Metric | None, best: list[str]
) -> None:
    name = metric.name if metric else "accuracy_loss"
    runs = [
        write_run(tmp_path / str(value), [logged(9, 2.0), evaluated(9, {f"x/{name}": value})]) for value in (1.0, 2.0)
    ]
    if metric:
        runs = [declare(run, "x", metric) for run in runs]
    page = report(tmp_path, *runs)
    assert re.findall(r'<td class="best">([^<]*)', (tmp_path / "page.html").read_text()) == best
    lower = metric is not None and metric.better == "lower"
    assert (f"{name.replace('_', ' ')} ↓" in page.text, "↓: lower is better" in page.text) == (lower, lower)


def test_declared_metrics_are_worded_grouped_and_charted_as_declared(tmp_path: Path) -> None:
    metrics = (
        Metric("a_err", "lower", "how far the counts are off", label="error", group="near"),
        Metric("b_err", "lower", label="error", group="far"),
        Metric("hits", "higher", unit="fraction", label="hits", group="near", prominence="headline"),
        Metric("num_dots", unit="count", label="dots"),
    )
    values = {"x/a_err": 3.0, "x/b_err": 4.0, "x/hits": 0.25, "x/num_dots": 1234}
    one, two = (
        declare(write_run(tmp_path / name, [logged(5, 2.0), evaluated(5, values), evaluated(9, values)]), "x", *metrics)
        for name in ("one", "two")
    )
    page = report(tmp_path, one)
    for words in (
        "near hits 25.0% x",  # a headline
        "x error ↓ hits near 3 25.0% far 4 — 1,234 dots; ↓: lower is better",
        "x: error ↓ near 3 far 4",  # a chart of what has one label in two groups
        "x: near hits 25.0%",
    ):
        assert words in page.text, words
    compared = report(tmp_path, one, two)
    assert "near error ↓ 3 3 far error ↓ 4 4 near hits 25.0% 25.0%" in compared.text
    assert 'title="how far the counts are off">near error' in (tmp_path / "page.html").read_text()


def test_a_run_of_before_metrics_were_declared_is_judged_by_those_that_ship(tmp_path: Path) -> None:
    values = {"image_to_text_median_rank": 1.0, "shift_0.5_text_to_image_r@1": 0.5, "top1": 0.5, "alignment": 0.5}
    runs = []
    for name, factor in (("first", 1), ("second", 2)):
        lines = [logged(9, 2.0), evaluated(9, {f"x/{metric}": value * factor for metric, value in values.items()})]
        runs.append(write_run(tmp_path / name, lines))
    page = report(tmp_path, *runs)
    assert re.findall(r'<td class="best">([^<]*)', (tmp_path / "page.html").read_text()) == ["1", "100.0%", "100.0%"]
    assert "text → image R@1, shift 0.5 50.0% 100.0%" in page.text


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first = full_run(tmp_path / "first")
    lines = [logged(n, 4.0, batch=64) for n in (10, 20)] + [evaluated(n, {"zs/top1": 0.9}, batch=64) for n in (10, 20)]
    recipe = {"model": {"open_clip": "ViT-B-32"}, "seed": 4, "optimizer": {"lr": 0.1}}
    page = report(tmp_path, first, write_run(tmp_path / "second", lines, recipe))
    assert "2 runs compared first second" in page.text
    assert "zs first second top-1 81.2% 90.0%" in page.text
    assert re.findall(r'<td class="best">([^<]*)', (tmp_path / "page.html").read_text()) == ["90.0%"]
    assert "median rank ↓ 2 —" in page.text
    assert "seed 3 4 optimizer.lr — 0.1" in page.text
    assert "samples seen" in page.text  # the global batches differ
    assert "photos: it has no caption 3 0" in page.text


def test_geometry_and_alarms_of_one_run(tmp_path: Path) -> None:
    lines = [logged(n, 2.0) for n in (10, 20)] + [observed(10, 1.25), observed(20, 0.75)]
    said = {"step": 20, "samples": 640, "alarm": "alarm: geometry/centroid_gap fell from 1.25 to 0.75"}
    page = report(tmp_path, write_run(tmp_path / "run", [*lines, said]))
    assert "Alarms step 20 geometry/centroid_gap fell from 1.25 to 0.75" in page.text
    assert "Geometry Gap of the centroids" in page.text
    assert "distance 0.75" in page.text
    assert "images -0.75 texts -1.5 across -3 " in page.text
    assert "Scores of positives and of hardest negatives positives hardest negatives" in page.text
    assert "cosine, by step" in page.text
    assert "Effective rank" not in page.text  # was not observed


def test_geometry_of_several_runs_stands_beside_what_they_can_do(tmp_path: Path) -> None:
    runs = []
    for name, gap in (("first", 1.0), ("second", 0.5)):
        lines = [logged(n, 2.0) for n in (10, 20)] + [evaluated(n, {"zs/top1": 0.3 * gap}) for n in (10, 20)]
        alarm = {"step": 20, "samples": 640, "alarm": f"alarm: {name} went off"}
        runs.append(write_run(tmp_path / name, [*lines, observed(10, gap), observed(20, gap / 2), alarm]))
    page = report(tmp_path, *runs)
    assert "Alarms first, step 20 first went off second, step 20 second went off" in page.text
    assert "zs: top-1 first 30.0% second 15.0%" in page.text
    assert "Gap of the centroids first 0.5 second 0.25" in page.text
    assert "Uniformity: texts first -1 second -0.5" in page.text
    assert "hardest negatives: second positives" in page.text
    assert not re.findall(r'<td class="best">0\.', (tmp_path / "page.html").read_text())


def test_what_only_describes_has_no_best_run(tmp_path: Path) -> None:
    figures = {"first": {"geo/centroid_gap": 0.5, "geo/arithmetic_r@1": 0.25}, "second": {"geo/centroid_gap": 0.75}}
    figures["second"]["geo/arithmetic_r@1"] = 0.125
    runs = [write_run(tmp_path / name, [logged(9, 2.0), evaluated(9, values)]) for name, values in figures.items()]
    page = report(tmp_path, *runs)
    assert "centroid gap 0.5 0.75" in page.text
    assert re.findall(r'<td class="best">([^<]*)', (tmp_path / "page.html").read_text()) == ["25.0%"]


def test_runs_are_told_apart_by_as_many_folders_as_it_takes(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert run_names([tmp_path / "run"]) == ["run"]
    with pytest.raises(UserError, match="is given twice"):
        run_names([tmp_path / "run", tmp_path / "run"])


def test_nothing_is_half_written(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    target = tmp_path / "out" / "page.html"
    with pytest.raises(UserError, match=r"^report .*page\.html: there is no folder .*out$"):
        write_report([run], target)
    target.parent.mkdir()
    target.write_text("older")
    with pytest.raises(UserError, match="not a run directory"):
        write_report([run, tmp_path], target)
    assert target.read_text() == "older"
    write_report([run], target)
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    assert target.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    "name",
    ["../../../secret.jpg", "/etc/passwd", "link.jpg", "notes.jpg", "none.jpg", "fifo.jpg", "cut.png", "", "a\x00"],
)
def test_a_listing_can_embed_nothing_but_pictures_beside_it(tmp_path: Path, name: str) -> None:
    secret = picture(7)
    (tmp_path / "secret.jpg").write_bytes(secret)
    run = full_run(tmp_path / "run")
    folder = run / "examples" / "ret"
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "notes.jpg").write_text("root:x:0:0:the secret")
    (folder / "cut.png").write_bytes(picture(7, form="PNG")[:200])
    os.mkfifo(folder / "fifo.jpg")
    listing = json.loads((folder / "examples.json").read_text())
    listing["best"][0]["image"] = name
    (folder / "examples.json").write_text(json.dumps(listing))
    page = report(tmp_path, run)
    assert sum(address.startswith("data:image/") for address in page.addresses) == 1  # the worst one's
    assert base64.b64encode(secret).decode() not in " ".join(page.addresses)
    assert "the picture is lost" in page.text


def test_a_rate_without_end_is_no_headline(tmp_path: Path) -> None:
    lines = [{**logged(10, 2.5), "samples_per_second": rate} for rate in (math.inf, 7.0, math.inf)]
    run = write_run(tmp_path / "run", lines)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "num_parameters": None}))
    write_report([run], tmp_path / "page.html")
    assert "samples a second" in (tmp_path / "page.html").read_text()


def test_tables_of_an_evaluation_are_shown_as_it_wrote_them_last(tmp_path: Path) -> None:
    """Counts are shaded by their share of the row, fractions by themselves; of several runs each has its own."""
    nasty = "<b>two</b>"

    def table(count: int) -> dict[str, Any]:
        rows = {nasty: [count, 1], "three": [0, 0]}
        return {
            "title": "answers",
            "columns": [nasty, "three"],
            "rows": rows,
            "unit": "count",
            "note": "how to read it",
        }

    kinds = {"title": "kinds", "columns": ["n", "share"], "rows": {"swap": [1234, 0.25]}, "unit": ["count", "fraction"]}
    lines = [evaluated(5, {"count/confusion": table(1)}), evaluated(9, {"count/confusion": table(3), "b/kinds": kinds})]
    run = write_run(tmp_path / "run", [logged(1, 2.0), *lines])
    page = report(tmp_path, run)
    assert "count: answers <b>two</b> three <b>two</b> 3 1 three 0 0 how to read it" in page.text
    assert "b: kinds n share swap 1,234 25.0%" in page.text
    text = (tmp_path / "page.html").read_text()
    for share, shown in ((75, "3"), (25, "1"), (25, "25.0%")):
        assert f'<td class="shaded" style="--share: {share}.0%">{shown}</td>' in text
    assert "<td>0</td><td>0</td>" in text
    assert "<td>1,234</td>" in text
    both = report(tmp_path, run, write_run(tmp_path / "other", [logged(1, 2.0), lines[0]]))
    assert "run: count: answers" in both.text
    assert "other: count: answers" in both.text


@pytest.mark.parametrize(
    "change",
    [{"rows": {"a": [1]}}, {"rows": {"a": [1, "2"]}}, {"columns": "ab"}, {"unit": "per cent"}, {"unit": ["count"]}],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"title": "answers", "columns": ["a", "b"], "rows": {"a": [1, 2]}, "unit": "count"}
    run = write_run(tmp_path / "run", [logged(1, 2.0), evaluated(1, {"count/confusion": {**good, **change}})])
    with pytest.raises(UserError, match=r"line 2 is damaged: eval/count/confusion: ") as caught:
        report(tmp_path, run)
    assert "\n" not in str(caught.value)
