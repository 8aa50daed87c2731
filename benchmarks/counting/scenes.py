"""Counting on rendered scenes: what a counting set teaches, with and without the counting loss, and without filtering.

    python -P -m benchmarks.counting.scenes [--work WORK] [--seeds 3] [--pretrain 100000] [--samples 200000]
                                            [--share 1/4] [--weight 0.3] [--ways WAY...] [--again]

As in the paper (Paiss et al., 2023), a contrastive model is trained first, here with the demo's towers on scenes whose
captions say "some" for every number; it is then fine-tuned in several ways for the same samples. The counting set is
made by `vlm data counting` from other scenes, whose captions have one number, wrong in every other one: by the true
counts, or (unfiltered) by the captions alone. Accuracy is that of `vlm eval counting` on held-out scenes (chance:
11.1 %). Beside it stand zero-shot accuracy and retrieval by captions without numbers. A finished run is kept.
"""

import argparse
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.counting.plain_captions import rewrite, with_wrong_numbers, without_numbers
from benchmarks.result_cache import ResultCache, machine
from launch.counting_options import BalanceOptions, DetectionOptions
from launch.counting_set import make_counting_set
from launch.recipe import check_recipe
from launch.recipe_file import read_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.json_lines import read_lines

LOSS = "with the loss"
WAYS: Mapping[str, tuple[str | None, Mapping[str, Any] | None]] = {
    "no counting data": (None, None),
    "counting data without the loss": ("counted", None),
    f"{LOSS}, scale none": ("counted", {"scale": "none"}),
    f"{LOSS}, logit scale": ("counted", {"scale": "logit_scale"}),
    f"{LOSS}, as negatives too": ("counted", {"scale": "logit_scale", "as_negatives": True}),
    f"{LOSS}, captions unfiltered": ("unfiltered", {"scale": "logit_scale"}),
}
CENTRAL = ["counting data without the loss", f"{LOSS}, logit scale"]
FIGURES = ("counting/accuracy", "counting/mean_absolute_deviation", "zeroshot/top1", "retrieval/image_to_text_r@1")
_WEB_SHARDS = slice(8, 20)


def prepare(work: Path, numbered_scenes: int = 80_000) -> dict[str, str]:
    """The shards of each source and of the retrieval set, made where they are not there."""
    scenes, numbered, data = work / "scenes", work / "numbered-scenes", work / "data"
    if not (scenes / "scenes.json").is_file():
        render_scenes(scenes, train=20_000, val=1_000, seed=0, image_size=64)
    if not (numbered / "scenes.json").is_file():
        render_scenes(numbered, train=numbered_scenes, val=1, seed=1, image_size=64)
    data.mkdir(exist_ok=True)
    made = {
        "web": rewrite(sorted(scenes.glob("train-*.tar"))[_WEB_SHARDS], data, "web", without_numbers),
        "retrieval": rewrite(sorted(scenes.glob("retrieval-*.tar")), data, "plain", without_numbers),
    }
    raw = rewrite(sorted(numbered.glob("train-*.tar")), data, "numbered", with_wrong_numbers)
    options = {
        "counted": DetectionOptions(detections="json:counts"),
        "unfiltered": DetectionOptions(captions_only=True),
    }
    for name, detection in options.items():
        folder = work / name
        if not folder.exists():
            make_counting_set([raw], detection, BalanceOptions(folder))
        made[name] = str(folder / "*.tar")
    return made


def recipe_of(arguments: argparse.Namespace, sources: Mapping[str, str], way: str | None, seed: int) -> dict[str, Any]:
    """The values of one run's recipe: pretraining (no way), or fine-tuning in one way."""
    work: Path = arguments.work
    _, values = read_recipe("scenes", ["trackers=[]", "model.captioner=none"])
    counting, loss = (None, None) if way is None else WAYS[way]
    data: dict[str, Any] = {"web": {"shards": sources["web"]}}
    if counting is not None:
        edits = {} if loss is None else {"counterfactuals": "number"}
        data["counting"] = {"shards": sources[counting], "share": arguments.share, **edits}
    name = "pretrained" if way is None else way
    evaluate = {
        "counting": {"kind": "counting", "shards": str(work / "scenes" / "counting-*.tar")},
        "zeroshot": {
            "kind": "zeroshot",
            "shards": str(work / "scenes" / "zeroshot-*.tar"),
            "classes": str(work / "scenes" / "zeroshot-classes.json"),
        },
        "retrieval": {"kind": "retrieval", "shards": sources["retrieval"]},
    }
    values |= {
        "run": str(work / f"{name}-{seed}"),
        "seed": seed,
        "duration": f"{arguments.pretrain if way is None else arguments.samples} samples",
        "objective": {"clip": 1.0, **({} if loss is None else {"counting": {"weight": arguments.weight, **loss}})},
        "evaluate": evaluate,
    }
    values["data"] |= {"root": None, "sources": data, "counterfactuals": None, "caption": "random"}
    if way is not None:
        values["model"]["pretrained"] = str(work / f"pretrained-{seed}")
        values["optimizer"] = {"lr": arguments.lr, "weight_decay": 0.1}
    return values


def trained(values: dict[str, Any]) -> dict[str, float]:
    """Train, or go on; the last evaluations."""
    train(check_recipe(values, "scenes"), resume="auto")
    figures: dict[str, float] = {}
    for line in read_lines(Path(values["run"]) / "metrics.jsonl").records:
        figures |= {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
    return figures


def shown(values: list[float], form: str) -> str:
    """The mean, and the least and the most of several."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/counting"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=100_000, help="samples of each contrastive model")
    parser.add_argument("--numbered-scenes", type=int, default=80_000, help="of which the counting set is made")
    parser.add_argument("--samples", type=int, default=200_000, help="samples of each fine-tuning")
    parser.add_argument("--share", default="1/4", help="of the counting set in every batch")
    parser.add_argument("--weight", type=float, default=0.3, help="of the counting loss")
    parser.add_argument("--lr", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=CENTRAL,
        help="by default the two that the loss is judged by",
    )
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work.resolve()
    sources = prepare(arguments.work, arguments.numbered_scenes)
    results = ResultCache(arguments.work, "counting-scenes", arguments.again)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for way in (None, *arguments.ways):
            values = recipe_of(arguments, sources, way, seed)
            found.setdefault(way or "before fine-tuning", []).append(
                results(Path(values["run"]).name, partial(trained, values))
            )
    print(machine(), "\n")
    print("| fine-tuned | counting accuracy | mean absolute deviation | zero-shot top-1 | R@1 image to text |")
    print("|---|---|---|---|---|")
    for way, figures in found.items():
        cells = [shown([one[name] for one in figures], ".2f" if "deviation" in name else ".1%") for name in FIGURES]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
