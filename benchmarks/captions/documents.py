"""Interleaved documents beside pairs: captions' likelihood and retrieval, on scenes.

    python -P -m benchmarks.captions.documents [--work WORK] [--steps 100] [--seeds 0 1] [--again]

Trains the demo's towers with a small captioning decoder for so many steps of 96 pairs, with CLIP's and the captioning
loss, in three ways: on the pairs alone; with 24 documents of two scenes each beside them (image, text, image, text) and
the term `interleaved`; and with the documents' scenes as 48 more pairs. Held out: the likelihood of a caption's token
(first captions of the 1,000 scenes of the retrieval set), that of a document's token (500 documents of other scenes),
of the second text when its image is swapped for another document's, and retrieval.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from webdataset.writer import TarWriter

from benchmarks.result_cache import ResultCache, machine
from data.config import DataConfig
from data.loading.heldout import HeldOutSet
from data.loading.stream import TrainStream
from data.scenes.splits import mixed
from data.scenes.writer import sample_of
from launch.model_source import load_model
from launch.recipe import load_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.batch import DOCUMENT_IMAGES, DOCUMENTS, Batch, Documents, Images
from vlm.distributed.world import World
from vlm.json_lines import read_lines
from vlm.model.dual_encoder import DualEncoder
from vlm.outputs import PAIR

PAIRS, PER_STEP, SCENES_A_DOCUMENT = 96, 24, 2
NUM_SCENES, NUM_HELD_OUT = 8_000, 500
TEXT = {
    "hf_tokenizer_name": "vlm:scenes",
    "vocab_size": 502,
    "context_length": 64,
    "width": 128,
    "heads": 4,
    "layers": 2,
}
WITH_DOCUMENTS = {"sources": {"scenes": {"shards": "documents-*.tar"}}, "per_step": PER_STEP}
BOTH = {"scenes": {"shards": "train-*.tar", "weight": 2}, "more": {"shards": "pairs-*.tar", "weight": 1}}
WAYS: dict[str, list[str]] = {
    "pairs": [],
    "pairs and documents": [
        f"data.documents={json.dumps(WITH_DOCUMENTS)}",
        "objective.interleaved=1.0",
    ],
    "more pairs": [
        f"data.sources={json.dumps(BOTH)}",
        f"global_batch={PAIRS + PER_STEP * SCENES_A_DOCUMENT}",
    ],
}


def write_documents(path: Path, split: str, count: int) -> None:
    """A shard of documents of two scenes that no other split shows: image, text, image, text."""
    plans = mixed(1, split, 0, SCENES_A_DOCUMENT * count)
    with path.open("wb") as stream, TarWriter(stream, encoder=False) as tar:
        for number in range(count):
            scenes = [sample_of(next(plans), 64) for _ in range(SCENES_A_DOCUMENT)]
            names = [f"{place}.jpg" for place in range(SCENES_A_DOCUMENT)]
            text = " ".join(f"<image>{str(scene['txt'], 'utf-8')}" for scene in scenes)  # type: ignore[arg-type]
            images = {name: scene["jpg"] for name, scene in zip(names, scenes, strict=True)}
            content = json.dumps({"images": names, "text": text}).encode()
            tar.write({"__key__": f"document-{number:06d}", "json": content, **images})


def write_pairs(path: Path, split: str, count: int) -> None:
    """The same scenes as pairs."""
    with path.open("wb") as stream, TarWriter(stream, encoder=False) as tar:
        for plan in mixed(1, split, 0, count):
            tar.write(sample_of(plan, 64))


def prepared(scenes: Path) -> None:
    """Scenes, and documents of other scenes."""
    if not (scenes / "held-out.tar").is_file():
        if not (scenes / "scenes.json").is_file():
            render_scenes(scenes, train=NUM_SCENES, val=100, seed=0, image_size=64)
        write_documents(scenes / "documents-0.tar", "documents", NUM_SCENES // 4)
        write_pairs(scenes / "pairs-0.tar", "documents", NUM_SCENES // 2)
        write_documents(scenes / "held-out.tar", "held-out", NUM_HELD_OUT)


def trained(work: Path, way: str, steps: int, seed: int) -> dict[str, float]:
    """Train, or go on; the last evaluation, the held-out likelihoods and the minutes."""
    run, began = work / f"{way.replace(' ', '-')}-{seed}", time.perf_counter()
    options = [
        f"data.root={work / 'scenes'}",
        f"run={run}",
        f"seed={seed}",
        f"duration={steps} steps",
        f"global_batch={PAIRS}",
        "data.caption=first",
        "data.workers=0",
        "schedule.warmup=30 steps",
        "trackers=[]",
        f"model.architecture.text_cfg={json.dumps(TEXT)}",
        "model.captioner={layers: 2, width: 128, heads: 4, queries: 16, pooler_heads: 4}",
        "objective={clip: 1.0, caption: 1.0}",
        "evaluate.zeroshot=null",
        "evaluate.captions=null",
        "evaluate.counting=null",
        "data.counterfactuals=null",
        "evaluate.retrieval.every=null",
        *WAYS[way],
    ]
    train(load_recipe("scenes", options), resume="auto")
    figures: dict[str, float] = {"minutes": (time.perf_counter() - began) / 60}
    for line in read_lines(run / "metrics.jsonl").records:
        figures |= {
            key: value for key, value in line.items() if key.startswith("eval/") and not isinstance(value, dict)
        }
    model = load_model(str(run)).eval()
    return figures | {"caption": caption_loss(model, work / "scenes")} | document_losses(model, work / "scenes")


@torch.no_grad()
def caption_loss(model: DualEncoder, scenes: Path) -> float:
    """-log p of a token of the held-out captions."""
    held_out = HeldOutSet([str(scenes / "retrieval-*.tar")], model.image_spec)
    total, count = 0.0, 0
    for batch in held_out.batches(World(), 100):
        tokens, lengths = model.tokenizer([held_out.captions[index][0] for index in batch.indices.tolist()])
        shown = model.encode_image_and_tokens(batch.images)[1]
        likelihood = model.caption_likelihood(shown, tokens, lengths)[batch.valid]
        total -= float(likelihood.sum())
        count += int((lengths - 1)[batch.valid].sum())
    return total / count


def held_out_documents(model: DualEncoder, scenes: Path) -> Iterator[Batch]:
    """The held-out documents, each once; the pairs beside them do not count."""
    config = DataConfig.model_validate(
        {
            "root": str(scenes),
            "sources": {"scenes": {"shards": "retrieval-*.tar"}},
            "augment": {"crop_scale": [1.0, 1.0]},
            "workers": 0,
            "documents": {"sources": {"scenes": {"shards": "held-out.tar"}}, "per_step": 50},
        }
    )
    stream = TrainStream(config, model.image_spec, model.tokenizer, global_batch=50, seed=0, world=World())
    yield from stream.batches(0, NUM_HELD_OUT // 50)


@torch.no_grad()
def document_losses(model: DualEncoder, scenes: Path) -> dict[str, float]:
    """-log p of a token of documents, of their second texts, and of these under another document's second image."""
    sums = dict.fromkeys(("document", "second text", "second text, wrong image"), 0.0)
    counts = dict.fromkeys(sums, 0)
    for batch in held_out_documents(model, scenes):
        documents = batch.parts[DOCUMENTS]
        assert isinstance(documents, Documents)
        images = batch.parts[DOCUMENT_IMAGES]
        assert isinstance(images, Images)
        turned = torch.arange(len(documents.lengths)).roll(1) * SCENES_A_DOCUMENT + 1
        order = torch.stack([torch.arange(0, len(turned) * SCENES_A_DOCUMENT, SCENES_A_DOCUMENT), turned], 1).flatten()
        swapped = Images(images.pixels[order], owners=images.owners)
        places = torch.arange(documents.tokens.shape[1] - 1) < (documents.lengths - 1)[:, None]
        second = (documents.seen_to[:, :-1] == SCENES_A_DOCUMENT)[places]
        for name, shown, chosen in (
            ("document", images, torch.ones_like(second)),
            ("second text", images, second),
            ("second text, wrong image", swapped, second),
        ):
            parts = {**batch.parts, DOCUMENT_IMAGES: shown}
            told = model(parts, PAIR | {"documents_likelihood"})["documents_likelihood"][:, 0]
            sums[name] -= float(told[chosen].sum())
            counts[name] += int(chosen.sum())
    return {name: sums[name] / counts[name] for name in sums}


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/documents"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured; not the runs themselves")
    arguments = parser.parse_args()
    work: Path = arguments.work
    results = ResultCache(work, "captions-documents", arguments.again)
    prepared(work / "scenes")
    columns = {
        "-log p a token of captions": "caption",
        "of documents": "document",
        "of second texts": "second text",
        "under a wrong image": "second text, wrong image",
        "R@1 image to text": "eval/retrieval/image_to_text_r@1",
        "R@1 text to image": "eval/retrieval/text_to_image_r@1",
        "minutes": "minutes",
    }
    found = {
        way: [results(f"{way} {seed}", partial(trained, work, way, arguments.steps, seed)) for seed in arguments.seeds]
        for way in WAYS
    }
    print(machine(), "\n")
    print(f"| run | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way, runs in found.items():
        print(f"| {way} | {' | '.join(shown([run[key] for run in runs], key) for key in columns.values())} |")


def shown(values: list[Any], key: str) -> str:
    """The mean over seeds, and least and most."""
    form = ".1%" if "r@1" in key else ".1f" if key == "minutes" else ".3f"
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
