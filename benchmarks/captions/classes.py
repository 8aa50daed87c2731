"""Classes of rendered scenes by the captioning decoder: the likeliest prompt beside the nearest embedding.

    python -P -m benchmarks.captions.classes [--work WORK] [--again]

Trains, or takes from `benchmarks.captions.scenes`, the demo's recipe for 120,000 samples: once on full descriptions
(the first caption of each scene), once on all captions, many of which are as short as prompts. Two held-out scenes of
each of 72 classes are classified by two prompts a class. One seed.
"""

import argparse
from functools import partial
from pathlib import Path

from benchmarks.captions.scenes import trained
from benchmarks.result_cache import ResultCache, machine
from launch.evaluate import evaluate_model, evaluator_config
from launch.scenes import render_scenes

RUNS = {"4 x 4": "full descriptions", "all captions": "all captions"}
WAYS = ("nearest embedding", "total", "token", "prior")
TEMPLATES = ("a {}", "there is a {}")
IMAGES = 144


def classified(work: Path, run: str, way: str) -> dict[str, float]:
    """The figures of one run by one way."""
    kind = "zeroshot" if way == WAYS[0] else "generative_zeroshot"
    scenes = work / "scenes"
    config = evaluator_config(
        kind,
        shards=[str(scenes / "zeroshot-*.tar")],
        classes=str(scenes / "zeroshot-classes.json"),
        templates=TEMPLATES,
        limit=IMAGES,
        batch_size=48,
        normalise=None if way == WAYS[0] else way,
    )
    return evaluate_model(str(work / run), config)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/captions"))
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    work: Path = arguments.work
    results = ResultCache(work, "captions-classes", arguments.again)
    if not (work / "scenes" / "scenes.json").is_file():
        render_scenes(work / "scenes", train=20_000, val=2_000, seed=0, image_size=64)
    for run, caption in zip(RUNS, ("first", "random"), strict=True):
        results(f"trained {run}", partial(trained, work, run, [f"data.caption={caption}"]))
    found = {(run, way): results(f"{run} {way}", partial(classified, work, run, way)) for run in RUNS for way in WAYS}
    print(machine(), "\n")
    print(f"| trained on | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for run, captions in RUNS.items():
        shown = " | ".join(f"{found[run, way]['top1']:.1%}" for way in WAYS)
        print(f"| {captions} | {shown} |")


if __name__ == "__main__":
    main()
