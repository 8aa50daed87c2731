"""Batches of neighbours over two stages: does the second learn what the first left out? (MCL: Zhang et al., 2024.)

    python -P -m benchmarks.counting.stages [--work WORK] [--seeds 3] [--samples 60000] [--clusters 10] [--again]

A contrastive model learns the demo's scenes; its image embeddings of the training scenes are put into clusters; a
second stage goes on from its weights on batches of one cluster each, its text tower locked, and a control on ordinary
batches, for as many samples. Each is joined with the first stage. What an embedding knows of a scene is the accuracy of
a linear probe for each attribute of the main group (the kind of which there are most), fitted on 4,000 training scenes,
of 1,000 held-out ones. A finished run is kept.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.result_cache import ResultCache, machine
from data.embeddings.embedded import EMBEDDINGS
from data.embeddings.parts import open_parts
from data.loading.heldout import HeldOutSet
from data.neighbours.write import ClusterJob
from launch.cluster import run_cluster
from launch.embed import embed_config, embed_shards
from launch.join import join_models
from launch.model_source import load_model
from launch.recipe import check_recipe
from launch.recipe_file import read_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.distributed.world import World

ATTRIBUTES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "colour": lambda truth: main_kind(truth).split()[0],
    "shape": lambda truth: main_kind(truth).split()[1],
    "number": lambda truth: str(truth["counts"][main_kind(truth)]),
    "background": lambda truth: str(truth["background"]),
    "size": lambda truth: str(truth["objects"][0]["size"]),
}
FITTED, TESTED = "train-00000[0-3].tar", "retrieval-*.tar"
STAGE_1, STAGE_2, CONTROL = "stage 1", "stage 2 on clusters", "stage 2 on ordinary batches"
EMBEDDINGS_OF: tuple[tuple[str, ...], ...] = (
    (STAGE_1,),
    (STAGE_2,),
    (CONTROL,),
    (STAGE_1, STAGE_2),
    (STAGE_1, CONTROL),
)


def main_kind(truth: Mapping[str, Any]) -> str:
    """The kind of objects of which there are most."""
    return str(max(truth["counts"], key=truth["counts"].__getitem__))


def recipe_values(arguments: argparse.Namespace, stage: str, seed: int) -> dict[str, Any]:
    """The recipe of one stage."""
    work: Path = arguments.work
    _, values = read_recipe("scenes", ["trackers=[]", "model.captioner=none", "objective={clip: 1.0}", "evaluate={}"])
    source: dict[str, Any] = {"shards": str(work / "scenes" / "train-*.tar")}
    if stage == STAGE_2:
        source["neighbours"] = {"labels": str(work / f"clusters-{seed}"), "by": "cluster"}
    values |= {"run": str(run_of(work, stage, seed)), "seed": seed, "duration": f"{arguments.samples} samples"}
    values["data"] |= {"root": None, "sources": {"scenes": source}, "counterfactuals": None}
    if stage != STAGE_1:
        values["model"] |= {"pretrained": str(run_of(work, STAGE_1, seed)), "lock": {"text": "all"}}
        values["optimizer"] = {"lr": 1e-3, "weight_decay": 0.1}
    return values


def run_of(work: Path, stage: str, seed: int) -> Path:
    """The run directory of a stage."""
    return work / f"{stage.replace(' ', '-')}-{seed}"


def trained(arguments: argparse.Namespace, stage: str, seed: int) -> bool:
    """Train a stage, or go on; before the second, the first one's embeddings are put into clusters."""
    work: Path = arguments.work
    clusters, embeddings = work / f"clusters-{seed}", work / f"embeddings-{seed}"
    if stage == STAGE_2 and not clusters.exists():
        shards, config = (
            [str(work / "scenes" / "train-*.tar")],
            embed_config("image", "first", "whole", "float32", "fp32"),
        )
        embed_shards(str(run_of(work, STAGE_1, seed)), shards, config, embeddings)
        folder = open_parts(embeddings, EMBEDDINGS, "EMBEDDINGS")
        run_cluster(ClusterJob(folder, "image", arguments.clusters, clusters, seed, None, None))
    train(check_recipe(recipe_values(arguments, stage, seed), "scenes"), resume="auto")
    return True


def probed(arguments: argparse.Namespace, stages: tuple[str, ...], seed: int) -> dict[str, float]:
    """The accuracy of a linear probe for each attribute, by the embeddings of a stage, or of several joined."""
    work: Path = arguments.work
    names = [str(run_of(work, stage, seed)) for stage in stages]
    model = names[0]
    if len(names) > 1:
        joined = work / f"{'+'.join(Path(name).name for name in names)}"
        if not joined.exists():
            join_models(names, joined)
        model = str(joined)
    (fitted, truths), (tested, asked) = (embedded(model, str(work / "scenes" / name)) for name in (FITTED, TESTED))
    accuracy = {}
    for attribute, read in ATTRIBUTES.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        probe.fit(fitted, [read(truth) for truth in truths])
        accuracy[attribute] = float(probe.score(tested, [read(truth) for truth in asked]))
    return accuracy


@torch.no_grad()
def embedded(name: str, shards: str) -> tuple[NDArray[np.float32], list[Mapping[str, Any]]]:
    """The image embeddings of scenes by a model, and what is true of each."""
    model = load_model(name).eval()
    held_out = HeldOutSet([shards], model.image_spec)
    rows, truths = list[NDArray[np.float32]](), list[Mapping[str, Any]]()
    for batch in held_out.batches(World(), 250):
        rows.append(model.encode_image(batch.images)[batch.valid].numpy())
        truths += [held_out.fields(index) for index in batch.indices[batch.valid].tolist()]
    return np.concatenate(rows), truths


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/stages"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60_000, help="of each stage")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.work = work = arguments.work.resolve()
    if not (work / "scenes" / "scenes.json").is_file():
        render_scenes(work / "scenes", train=20_000, val=1_000, seed=0, image_size=64)
    results = ResultCache(work, "stages", arguments.again)
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for stage in (STAGE_1, STAGE_2, CONTROL):
            results(f"{stage} {seed}", partial(trained, arguments, stage, seed))
        for stages in EMBEDDINGS_OF:
            figures = results(f"{' + '.join(stages)} {seed} probed", partial(probed, arguments, stages, seed))
            found.setdefault(stages, []).append(figures)
    print(machine(), "\n")
    print(f"| embedding of | {' | '.join(ATTRIBUTES)} |\n|---|{'---|' * len(ATTRIBUTES)}")
    for stages, runs in found.items():
        cells = []
        for attribute in ATTRIBUTES:
            values = [run[attribute] for run in runs]
            cells.append(f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})")
        print(f"| {' joined with '.join(stages)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
