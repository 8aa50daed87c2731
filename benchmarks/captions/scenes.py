"""Captions of rendered scenes: how often the count, colour and shape of the main group are named rightly.

    python -P -m benchmarks.captions.scenes [--work WORK] [--samples 120000] [--runs NAME ...] [--again]

Renders the demo's scenes, then trains its recipe for the same number of samples and the same full descriptions (the
first caption of each scene): with the contrastive loss alone, and with the captioning decoder beside it, which looks at
maps of 2 x 2, 4 x 4 or 8 x 8 places of the image tower. The 1,000 held-out scenes of the retrieval set are captioned;
the main group is the kind of which there are most, the first of several. Retrieval of the runs stands beside. One seed.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.result_cache import ResultCache, machine
from data.loading.heldout import HeldOutSet
from data.scenes.captions import SIZE_WORDS
from data.scenes.vocabulary import NUMBER_WORDS, plural
from launch.caption import caption_pictures, generation_config
from launch.model_source import load_model
from launch.recipe import load_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.json_lines import read_lines

NO_DECODER = "contrastive alone"
PLAIN = ["data.counterfactuals=null", "objective={clip: 1.0, caption: 2.0}", "evaluate.counting=null"]  # no counting
RUNS: Mapping[str, list[str]] = {
    NO_DECODER: ["objective={clip: 1.0}", "model.captioner=none", "evaluate.captions=null"],
    "2 x 2": ["model.captioner.feature_map=null"],
    "4 x 4": [],
    "8 x 8": ["model.captioner.feature_map=-3"],
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"method": "greedy"},
    "contrastive search, k 4, alpha 0.1": {"method": "contrastive", "k": 4, "alpha": 0.1},
    "beam of 4": {"method": "beam", "beams": 4},
}
_SIZES = "|".join(word for words in SIZE_WORDS.values() for word in words)


def names_main_group(caption: str, counts: Mapping[str, int]) -> bool:
    """Whether a caption says how many of the main kind there are, by number, colour and shape."""
    kind = max(counts, key=counts.__getitem__)
    colour, shape = kind.split()
    count = counts[kind]
    numbers = [str(count), NUMBER_WORDS[count], *(["a", "an"] if count == 1 else [])]
    noun = shape if count == 1 else plural(shape)
    return re.search(rf"(?<![\w-])(?:{'|'.join(numbers)}) (?:(?:{_SIZES}) )?{colour} {noun}\b", caption) is not None


def trained(work: Path, name: str, options: list[str], samples: int) -> dict[str, float]:
    """Train, or go on; the last evaluation and the minutes."""
    scenes, run, began = work / "scenes", work / name, time.perf_counter()
    common = [
        f"data.root={scenes}",
        f"run={run}",
        "data.caption=first",
        "trackers=[]",
        *PLAIN,
        f"duration={samples} samples",
    ]
    train(load_recipe("scenes", [*common, *options]), resume="auto")
    figures: dict[str, float] = {"minutes": (time.perf_counter() - began) / 60}
    for line in read_lines(run / "metrics.jsonl").records:
        figures |= {
            key: value for key, value in line.items() if key.startswith("eval/") and not isinstance(value, dict)
        }
    return figures


def named(work: Path, run: str, method: str) -> dict[str, Any]:
    """The fraction of held-out scenes whose main group is named, and some captions."""
    shards = [str(work / "scenes" / "retrieval-*.tar")]
    began = time.perf_counter()
    captioned = caption_pictures(str(work / run), shards, generation_config(METHODS[method]))
    took = time.perf_counter() - began
    held_out = HeldOutSet(shards, load_model(str(work / run)).image_spec)
    right = [names_main_group(one.caption.text, held_out.fields(one.position)["counts"]) for one in captioned]
    examples = [(one.caption.text, held_out.captions[one.position][0]) for one in captioned[:4]]
    return {"fraction": sum(right) / len(right), "images": len(right), "seconds": took, "examples": examples}


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/captions"))
    parser.add_argument("--samples", type=int, default=120_000, help="that each run is trained on")
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="measure these alone")
    arguments = parser.parse_args()
    work: Path = arguments.work
    results = ResultCache(work, "captions-scenes", arguments.again)
    if not (work / "scenes" / "scenes.json").is_file():
        render_scenes(work / "scenes", train=20_000, val=2_000, seed=0, image_size=64)
    print(machine(), "\n")
    print("| decoder looks at | R@1 image to text | text to image | zero-shot top-1 | main group named | minutes |")
    print("|---|---|---|---|---|---|")
    for run in arguments.runs:
        figures = results(run, partial(trained, work, run, RUNS[run], arguments.samples))
        recalls = [figures[f"eval/retrieval/{way}_r@1"] for way in ("image_to_text", "text_to_image")]
        shown = " | ".join(f"{value:.1%}" for value in (*recalls, figures["eval/zeroshot/top1"]))
        fraction = ""
        if run != NO_DECODER:
            fraction = f"{results(f'{run} greedy', partial(named, work, run, 'greedy'))['fraction']:.1%}"
        print(f"| {run} | {shown} | {fraction} | {figures['minutes']:.1f} |", flush=True)
    decoders = [run for run in arguments.runs if run != NO_DECODER]
    if not decoders:
        return
    best = decoders[-1]
    print(f"\n| captions, {best} | main group named rightly | seconds for 1,000 images |\n|---|---|---|")
    for method in METHODS:
        found = results(f"{best} {method}", partial(named, work, best, method))
        print(f"| {method} | {found['fraction']:.1%} | {found['seconds']:.0f} |")
    print("\n" + json.dumps(results(f"{best} greedy", dict)["examples"], indent=1))


if __name__ == "__main__":
    main()
