"""Captions of real photographs: Flickr8k with a pretrained image tower, with and without a captioning decoder.

    python -P -m benchmarks.captions.flickr8k DATA TOWER [--work WORK] [--seeds 3] [--epochs 6] [--size 128]

DATA has the official splits as shards (`flickr8k-train-*.tar`, `-val-`, `-test-`), five captions a picture; TOWER is
a safetensors file of timm's tf_efficientnet_lite0, trained on ImageNet's classes alone, which stays locked. Text tower
and decoder begin from scratch, with the words of the training captions as their vocabulary. Each seed trains with the
contrastive loss alone and with the decoder beside it, on the same samples. Settings were chosen on the validation
split; the tables are of the test split. A finished run is kept, and an unfinished one goes on.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.captions.words import captions_of, write_tokenizer
from benchmarks.result_cache import ResultCache, machine
from eval.captioning import CaptioningConfig
from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from launch.recipe import Recipe, load_recipe
from launch.train import train
from vlm.json_lines import read_lines
from vlm.yaml_text import parse_yaml

METHODS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"method": "greedy"},
    "beam of 4": {"method": "beam", "beams": 4},
    "contrastive search, k 4, alpha 0.1": {"method": "contrastive", "k": 4, "alpha": 0.1},
}
BATCH = 64
LONGEST = 22  # tokens: 95 % of the captions have no more
_RECIPE = """
model:
  towers:
    embed_dim: 256
    image: {timm: tf_efficientnet_lite0}
    text:
      text_cfg: {width: 256, heads: 4, layers: 2, embed_cls: true, correct_cls_mask: true, pad_id: 0}
  lock: {image: all}
data:
  sources: {flickr8k: {shards: "flickr8k-train-*.tar"}}
  caption: all
  augment: {crop_scale: [0.7, 1.0], flip: true}
  workers: 1
precision: bf16
optimizer: {lr: 1.5e-3, weight_decay: 0.05}
schedule: {warmup: 60 steps}
log_every: 10 steps
checkpoint_every: 1 epoch
trackers: []
"""


def contrastive() -> dict[str, Any]:
    """What the run without decoder adds: the loss over images and texts, of which each has one a step."""
    return {"objective": {"clip": 1.0}}


def captioner() -> dict[str, Any]:
    """What the run with a decoder adds: it learns from all five captions, after one forward of the image tower."""
    return {
        "objective": {"clip": 1.0, "caption": {"weight": 2.0, "captions": "all", "label_smoothing": 0.1}},
        "model": {"captioner": {"pooler": "tower", "layers": 2, "heads": 4}},
    }


VARIANTS: Mapping[str, Callable[[], dict[str, Any]]] = {"captioner": captioner, "contrastive": contrastive}


def base_values(data: Path, tower: Path, work: Path, size: int) -> dict[str, Any]:
    """A recipe's values for Flickr8k behind the locked tower; the tokenizer of its words is written below `work`."""
    words, shards = work / "words", sorted(data.glob("flickr8k-train-*.tar"))
    if not shards:
        raise SystemExit(f"{data}: no flickr8k-train-*.tar; DATA names the folder of the shards")
    num_words = write_tokenizer(captions_of(shards), words)
    values: dict[str, Any] = parse_yaml(_RECIPE)
    values["model"]["image_size"] = size
    values["model"]["towers"]["image"]["weights"] = str(tower)
    values["model"]["towers"]["text"]["text_cfg"] |= {
        "hf_tokenizer_name": str(words),
        "vocab_size": num_words,
        "context_length": LONGEST,
    }
    values["data"]["root"] = str(data)
    values["global_batch"] = BATCH
    return values


def recipe_of(arguments: argparse.Namespace, variant: str, seed: int) -> Recipe:
    """The recipe of one run, which is `WORK/VARIANT-SIZE-EPOCHS-SEED`."""
    base = base_values(arguments.data, arguments.tower, arguments.work, arguments.size)
    values = merged(base, VARIANTS[variant]())
    if variant != "contrastive":
        values["evaluate"] = {"val": {"kind": "caption", "shards": "flickr8k-val-*.tar", "every": "2 epochs"}}
    run = arguments.work / f"{variant}-{arguments.size}-{arguments.epochs}-{seed}"
    values |= {"seed": seed, "duration": f"{arguments.epochs} epochs", "run": str(run)}
    return written(values)


def written(values: Mapping[str, Any]) -> Recipe:
    """The recipe of these values, whose file lies beside its run directory."""
    run = Path(values["run"])
    file = run.parent / f"{run.name}.yaml"
    file.write_text(json.dumps(values, indent=1))
    return load_recipe(str(file))


def merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with another laid over it."""
    for key, value in more.items():
        inner = base.get(key)
        base[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return base


def trained(recipe: Recipe) -> dict[str, float]:
    """Train, or go on; the validation figures by step."""
    train(recipe, resume="auto")
    lines = read_lines(Path(recipe.run) / "metrics.jsonl").records
    return {str(line["step"]): line["eval/val/cider_d"] for line in lines if "eval/val/cider_d" in line}


def retrieved(recipe: Recipe) -> dict[str, float]:
    """Retrieval among the test pictures."""
    values = {"kind": "retrieval", "shards": _test_split(recipe)}
    return evaluate_model(recipe.run, RetrievalConfig.model_validate(values))


def captioned(recipe: Recipe, method: str) -> dict[str, float]:
    """The figures of the test pictures' captions."""
    values = {"kind": "caption", "shards": _test_split(recipe), "generation": METHODS[method]}
    return evaluate_model(recipe.run, CaptioningConfig.model_validate(values))


def _test_split(recipe: Recipe) -> str:
    return str(Path(recipe.data.root or ".") / "flickr8k-test-*.tar")


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the least and the most of several."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def caption_lines(results: ResultCache, recipes: Mapping[str, Recipe]) -> list[str]:
    """The table of ways of generating, of the runs with a decoder by name."""
    names = ("cider_d", "bleu_4", "rouge_l", "true_image_preferred", "nll_per_token", "caption_length")
    forms = (".3f", ".3f", ".3f", ".1%", ".3f", ".1f")
    lines = ["| captions | CIDEr-D | BLEU-4 | ROUGE-L | true image preferred | nats a token | tokens |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method in METHODS:
        found = [results(f"{name} {method}", partial(captioned, recipe, method)) for name, recipe in recipes.items()]
        cells = (spread([one[key] for one in found], form) for key, form in zip(names, forms, strict=True))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def retrieval_lines(results: ResultCache, recipes: Mapping[str, Mapping[str, Recipe]]) -> list[str]:
    """The table of retrieval, of all runs by variant and name."""
    lines = ["| run | R@1 image to text | R@1 text to image | R@10 image to text | R@10 text to image |"]
    lines.append("|---|---|---|---|---|")
    for variant, runs in recipes.items():
        found = [results(f"{name} retrieval", partial(retrieved, recipe)) for name, recipe in runs.items()]
        keys = [f"{way}_r@{k}" for k in (1, 10) for way in ("image_to_text", "text_to_image")]
        lines.append(f"| {variant} | {' | '.join(spread([one[key] for one in found], '.1%') for key in keys)} |")
    return lines


def main() -> None:
    """Train and measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tower", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/flickr8k"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = ResultCache(arguments.work, "flickr8k", arguments.again)
    recipes: dict[str, dict[str, Recipe]] = {variant: {} for variant in VARIANTS}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            recipe = recipe_of(arguments, variant, seed)
            name = Path(recipe.run).name
            recipes[variant][name] = recipe
            results(f"{name} training", partial(trained, recipe))
    lines = [*caption_lines(results, recipes["captioner"]), "", *retrieval_lines(results, recipes)]
    print(machine(), "", *lines, sep="\n")


if __name__ == "__main__":
    main()
