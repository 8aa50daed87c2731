"""A decoder trained on texts alone, then captioning images: by noise and correction of the gap, beside paired training.

    python -P -m benchmarks.captions.text_only [--work WORK] [--again] [--seeds N] [--samples N] [--contrastive N]
    python -P -m benchmarks.captions.text_only --model MODEL.yaml --data DIR --train A --pairs B --test C

Without `--model`, the demo's scenes are rendered, and a contrastive model with the demo's towers learns them for the
demo's 120,000 samples (`--contrastive`). MODEL.yaml holds the `model` section of a recipe with a pretrained dual
encoder.

Behind the frozen towers the same small decoder is trained each time for as many samples, on the first caption of each:
from texts, for each noise and correction, and from the images. It then captions the test images greedily. What images
and texts differ by is measured on the `--pairs`. Finished runs are kept, and gone on from.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.result_cache import ResultCache, machine
from launch.gap import captioned_images, write_gap
from launch.recipe import check_recipe
from launch.recipe_file import read_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.json_lines import read_lines

NOISES = (0.0, 0.05, 0.1, 0.2)
GAPS: tuple[Mapping[str, Any], ...] = (
    *({"noise": noise} for noise in NOISES),
    *({"noise": noise, "correction": "mean"} for noise in NOISES),
    {"noise": 0.0, "correction": "covariance"},
)
DECODER = {"pooler": "embedding", "layers": 2, "width": 64, "heads": 4}
TESTED = 500
FIGURES = ("cider_d", "bleu_4", "true_image_preferred", "nll_per_token")


class Setting(NamedTuple):
    """A frozen dual encoder (`model` section of a recipe, with its weights) and the shards below `root`."""

    work: Path
    model: Mapping[str, Any]
    root: Path
    train: str
    pairs: str
    test: str
    samples: int

    @property
    def gap_file(self) -> Path:
        """What images and texts of the pairs differ by."""
        return self.work / "gap.safetensors"


def trained(setting: Setting, name: str, gap: Mapping[str, Any] | None, seed: int) -> dict[str, float]:
    """Train the decoder from texts across `gap` (None: from images), or go on; the figures of its captions."""
    has_file = gap is not None and "correction" in gap
    gap_fields = {**gap, **({"statistics": str(setting.gap_file)} if has_file else {})} if gap is not None else None
    run = setting.work / f"{name}-{seed}"
    recipe = {
        "run": str(run),
        "seed": seed,
        "model": {
            **setting.model,
            "lock": {"image": "all", "text": "all"},
            "learn_logit_scale": False,
            "captioner": {**DECODER, "gap": gap_fields},
        },
        "data": {
            "root": str(setting.root),
            "sources": {"all": {"shards": setting.train}},
            "images": gap is None,
            "caption": "first",
            "augment": {"crop_scale": [1.0, 1.0]},
            "workers": 1,
        },
        "duration": f"{setting.samples} samples",
        "global_batch": 128,
        "objective": {"caption": {"sight": "image" if gap is None else "text"}},
        "optimizer": {"lr": 3.0e-3},
        "schedule": {"warmup": "20 steps"},
        "geometry": {"every": None},
        "trackers": [],
        "evaluate": {"captions": {"kind": "caption", "shards": setting.test, "limit": TESTED}},
    }
    train(check_recipe(recipe, name), resume="auto")
    figures: dict[str, float] = {}
    for line in read_lines(run / "metrics.jsonl").records:
        figures |= {key.rpartition("/")[2]: value for key, value in line.items() if key.startswith("eval/captions/")}
    return figures


def scenes(work: Path, samples: int, contrastive: int) -> Setting:
    """The demo's scenes, and a contrastive model of them that saw so many; both are kept."""
    folder, run = work / "scenes", work / "contrastive"
    if not (folder / "scenes.json").is_file():
        render_scenes(folder, train=20_000, val=2_000, seed=0, image_size=64)
    overrides = [
        f"data.root={folder}",
        f"run={run}",
        "trackers=[]",
        f"duration={contrastive} samples",
        "model.captioner=none",
        "objective={clip: 1.0}",
        "evaluate.zeroshot=null",
        "evaluate.captions=null",
        "evaluate.counting=null",
        "data.counterfactuals=null",
        "evaluate.retrieval.every=null",
    ]
    _, values = read_recipe("scenes", overrides)
    train(check_recipe(values, "scenes"), resume="auto")
    model = {**values["model"], "pretrained": str(run)}
    return Setting(work, model, folder, "train-*.tar", "zeroshot-*.tar", "retrieval-*.tar", samples)


def _runs(seeds: int) -> Iterator[tuple[str, Mapping[str, Any] | None, int]]:
    """All runs by name: seed after seed, so that a script that is stopped has measured all ways."""
    for seed in range(seeds):
        yield "images", None, seed
        for gap in GAPS:
            yield f"{gap.get('correction', 'none')}-{gap['noise']:g}", gap, seed


def _table(results: Mapping[str, list[dict[str, float]]]) -> None:
    print(f"| trained on | correction | noise | {' | '.join(FIGURES)} |\n|{'---|' * (3 + len(FIGURES))}")
    for name, figures in results.items():
        correction, _, noise = name.rpartition("-")
        what = f"texts | {correction} | {noise}" if correction else "pairs | | "
        print(f"| {what} | {' | '.join(_shown([one[figure] for one in figures]) for figure in FIGURES)} |")


def _shown(values: list[float]) -> str:
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/text_only"))
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=30_000, help="that each decoder is trained on")
    parser.add_argument("--contrastive", type=int, default=120_000, help="samples of the model of scenes")
    parser.add_argument("--model", type=Path, help="YAML with the model section of a pretrained dual encoder")
    for name in ("data", "train", "pairs", "test"):
        parser.add_argument(f"--{name}", type=Path if name == "data" else str)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    if given.model is None:
        setting = scenes(work, given.samples, given.contrastive)
    else:
        model = yaml.safe_load(given.model.read_text())
        setting = Setting(work, model, given.data.resolve(), given.train, given.pairs, given.test, given.samples)
    results = ResultCache(work, "captions-text-only", given.again)
    pairs = captioned_images([str(setting.root / setting.pairs)])
    gap = results("gap", lambda: write_gap(str(setting.model["pretrained"]), pairs, setting.gap_file))
    table: dict[str, list[dict[str, float]]] = {}
    for name, fields, seed in _runs(given.seeds):
        run = partial(trained, setting, name, fields, seed)
        table.setdefault(name, []).append(results(f"{name} seed {seed}", run))
    print(machine(), "\n")
    _table(table)
    print("\n" + json.dumps(gap, indent=1))


if __name__ == "__main__":
    main()
