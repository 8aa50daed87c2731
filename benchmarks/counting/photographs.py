"""Counting and hard negatives on photographs: Flickr8k behind a pretrained image tower, with and without the losses.

    python -P -m benchmarks.counting.photographs DATA TOWER [--work WORK] [--seeds 3] [--epochs 6] [--fine-tune]

DATA has Flickr8k, COCO-mini, SugarCrepe and flickr8k-counts.json; TOWER is a safetensors file of timm's
tf_efficientnet_lite0, trained on ImageNet's classes alone, which stays locked; the text tower begins from scratch. With
`--fine-tune` each run is followed by an epoch that trains the image tower too, at a low rate.

The counting set is made by `vlm data counting` from training pictures three of whose captions agree on a number: mostly
twos. It is an eighth of each batch. Accuracy of counting is among 2 to 5, of the 159 test pictures of these numbers and
of COCO-mini's pictures whose caption has a number that its counts confirm; intervals are of 95 %. The accuracy of an
editor is that of the first caption of each of 1,000 test pictures against one edit of it. SugarCrepe's 83 pairs are
those whose pictures are in COCO-mini. A finished run is kept.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.captions.flickr8k import base_values, merged, spread, trained, written
from benchmarks.counting.rules import EDITORS
from benchmarks.result_cache import ResultCache, machine
from data.counterfactuals.counterfactual import counterfactuals
from data.counterfactuals.editor import CaptionInSample
from eval.compositional import CompositionalConfig
from eval.counting import CountingConfig
from eval.retrieval import RetrievalConfig
from launch.counting_options import BalanceOptions, DetectionOptions
from launch.counting_set import make_counting_set
from launch.evaluate import evaluate_model
from launch.recipe import Recipe

NUMBERS = (2, 3, 4, 5)
MOST_PER_NUMBER = 200
OTHERS = [name for name in EDITORS.editors if name != "number"]
COUNTED: Mapping[str, Any] = {"shards": "COUNTED", "share": "1/8"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "clip": {"objective": {"clip": 1.0}},
    "clip, counting set": {"objective": {"clip": 1.0}, "data": {"sources": {"counted": COUNTED}}},
    "clip, counting": {
        "objective": {"clip": 1.0, "counting": {"scale": "logit_scale"}},
        "data": {"sources": {"counted": {**COUNTED, "counterfactuals": "number"}}},
    },
    "hard negatives": {
        "objective": {"hard_negative_captions": {"editors": OTHERS}},
        "data": {"counterfactuals": {"editors": {name: EDITORS.editors[name].model_dump() for name in OTHERS}}},
    },
}


def prepare(data: Path, work: Path) -> dict[str, Path]:
    """The counting set, the numbers of the test pictures, and their edited captions, made where they are not there."""
    made = {"counted": work / "counted", "labels": work / "test-numbers.json", "edited": work / "edited-test.tar"}
    entries = json.loads((data / "flickr8k-counts.json").read_text())
    test = [entry for entry in entries if entry["split"] == "test" and entry["number"] in NUMBERS]
    made["labels"].write_text(json.dumps(test))
    if not made["counted"].exists():
        detections = work / "train-numbers.jsonl"
        training = (entry for entry in entries if entry["split"] == "train")
        lines = [json.dumps({"key": entry["key"], "counts": {"objects": entry["number"]}}) for entry in training]
        detections.write_text("\n".join(lines) + "\n")
        make_counting_set(
            [str(data / "flickr8k-train-*.tar")],
            DetectionOptions(detections=str(detections)),
            BalanceOptions(made["counted"], most_per_number=MOST_PER_NUMBER),
        )
    if not made["edited"].exists():
        write_edited(data / "flickr8k-test-000000.tar", made["edited"])
    return made


def write_edited(shard: Path, copy: Path) -> None:
    """A copy of a shard whose samples have one wrong caption by each editor: json `negatives`, by the editors' name."""
    aside = copy.with_suffix(".part")
    with tarfile.open(shard) as stored, tarfile.open(aside, "w") as made:
        for number, member in enumerate(stored):
            content = stored.extractfile(member)
            assert content is not None
            raw = content.read()
            if member.name.endswith(".json"):
                fields = json.loads(raw)
                caption = CaptionInSample(fields["captions"][0], tuple(fields["captions"]))
                edits = counterfactuals(caption, EDITORS, (0, 0, number)).made
                raw = json.dumps({**fields, "negatives": {one.editor: [one.text] for one in edits}}).encode()
                member.size = len(raw)
            made.addfile(member, io.BytesIO(raw))
    aside.rename(copy)


def recipe_of(arguments: argparse.Namespace, made: Mapping[str, Path], way: str, seed: int, *, tuned: bool) -> Recipe:
    """The recipe of one run, with the image tower locked or, after that, trained with a tenth of the rate."""
    base = base_values(arguments.data, arguments.tower, arguments.work, arguments.size)
    values = merged(base, json.loads(json.dumps(WAYS[way]).replace("COUNTED", str(made["counted"] / "*.tar"))))
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    values |= {"seed": seed, "duration": f"{arguments.epochs} epochs", "run": str(arguments.work / name)}
    if tuned:
        values["model"]["towers"]["image"].pop("weights")
        values["model"].pop("lock")
        values["model"]["pretrained"] = values["run"]
        values |= {"duration": "1 epochs", "run": f"{values['run']}-tuned", "optimizer": {"lr": 1e-4}}
    return written(values)


def measured(recipe: Recipe, data: Path, made: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """All figures of a run, by evaluation."""
    counting = {"kind": "counting", "numbers": NUMBERS}
    coco, composition = str(data / "coco-mini-*.tar"), {"kind": "compositional", "decoder": False}
    test = str(data / "flickr8k-test-*.tar")
    configs: dict[str, Any] = {
        "test": CountingConfig.model_validate({**counting, "file": str(made["labels"]), "shards": test}),
        "coco": CountingConfig.model_validate({**counting, "shards": coco}),
        "editors": CompositionalConfig.model_validate({**composition, "shards": str(made["edited"])}),
        "sugarcrepe": CompositionalConfig.model_validate(
            {**composition, "file": str(data / "sugarcrepe.json"), "shards": coco}
        ),
        "retrieval": RetrievalConfig.model_validate({"kind": "retrieval", "shards": test}),
    }
    return {name: evaluate_model(recipe.run, config) for name, config in configs.items()}


def print_table(
    found: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], columns: Mapping[str, tuple[str, str]]
) -> None:
    """A row for each way, of figures by evaluation and name; of several seeds the mean, the least and the most."""
    print(f"\n| trained with | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way, runs in found.items():
        cells = [spread([run[kind][name] for run in runs], ".1%") for kind, name in columns.values()]
        print(f"| {way} | {' | '.join(cells)} |")


def main() -> None:
    """Train and measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tower", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/counting-photographs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="measure these alone")
    parser.add_argument("--fine-tune", action="store_true", help="train the image tower too, afterwards")
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work.resolve()
    made = prepare(arguments.data, arguments.work)
    results = ResultCache(arguments.work, "counting-photographs", arguments.again)
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for seed in range(arguments.seeds):
        for way in arguments.ways:
            for tuned in (False, True) if arguments.fine_tune else (False,):
                recipe = recipe_of(arguments, made, way, seed, tuned=tuned)
                name = Path(recipe.run).name
                results(f"{name} training", partial(trained, recipe))
                figures = results(f"{name} figures", partial(measured, recipe, arguments.data, made))
                found.setdefault(f"{way}, tuned" if tuned else way, []).append(figures)
    print(machine())
    counted = {
        "test pictures, 2 to 5": ("test", "accuracy"),
        "mean over numbers": ("test", "macro_accuracy"),
        "COCO-mini": ("coco", "accuracy"),
        "R@1 image to text": ("retrieval", "image_to_text_r@1"),
        "R@1 text to image": ("retrieval", "text_to_image_r@1"),
    }
    print_table(found, counted)
    print_table(
        found,
        {
            **{name: ("editors", f"accuracy_{name}") for name in EDITORS.editors},
            "SugarCrepe": ("sugarcrepe", "accuracy"),
        },
    )


if __name__ == "__main__":
    main()
