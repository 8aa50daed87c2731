"""Run directories as training writes them, small."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tests.data.small_shards import picture
from vlm.evaluation import Metric

FACTS = {
    "started": "2030-01-02T03:04:05+00:00",
    "machine": {"system": "Linux", "processor": "Some CPU", "cores": 2, "memory_gib": 4.0, "gpu": None},
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "world_size": 2,
    "engine": "zero2",
    "precision": "bf16",
    "threads": 1,
    "num_parameters": 1234567,
    "data": [{"name": "photos", "shards": 4, "samples": 6000, "weight": 1.0}],
}


def logged(step: int, loss: float, batch: int = 32, **more: float) -> dict[str, Any]:
    """The line of a logged step."""
    rest = {"logit_scale": 14.0 + step, "lr": 1e-3, "grad_norm": 1.0, "samples_per_second": 100.0, "data_wait": 0.25}
    return {"step": step, "samples": step * batch, "loss": loss, "clip": loss, **rest, **more}


def evaluated(step: int, values: Mapping[str, Any], batch: int = 32) -> dict[str, Any]:
    """The line of an evaluation."""
    return {"step": step, "samples": step * batch, **{f"eval/{key}": value for key, value in values.items()}}


def observed(step: int, gap: float, batch: int = 32) -> dict[str, Any]:
    """The line of an observation of geometry: some of its figures, and its histograms in four bins."""
    figures = {"centroid_gap": gap, "uniformity_image": -gap, "uniformity_text": -2 * gap, "uniformity_cross": -3.0}
    counts = {"positive_scores": [0, 1, 3, step], "hardest_negative_scores": [0, step, 2, 1]}
    return {
        "step": step,
        "samples": step * batch,
        **{f"geometry/{key}": value for key, value in {**figures, **counts}.items()},
    }


def write_run(path: Path, lines: list[dict[str, Any]], recipe: Mapping[str, Any] | None = None, torn: str = "") -> Path:
    """A run with these lines of metrics and, at the end, the beginning of one more."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe or {"model": {"open_clip": "ViT-B-32"}, "seed": 3})))
    (path / "run.json").write_text(json.dumps(FACTS))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return path


def declare(path: Path, evaluation: str, *metrics: Metric) -> Path:
    """The run, its facts saying what an evaluation measures."""
    facts = json.loads((path / "run.json").read_text())
    facts.setdefault("metrics", {})[evaluation] = [asdict(metric) for metric in metrics]
    (path / "run.json").write_text(json.dumps(facts))
    return path


def write_ledger(path: Path, reasons: list[str]) -> None:
    """Skipped samples of a run."""
    lines = [
        {"step": n, "source": "photos", "shard": "a.tar", "key": str(n), "reason": reason, "substitute": "b"}
        for n, reason in enumerate(reasons)
    ]
    (path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_examples(path: Path, evaluation: str, caption: str) -> None:
    """One best and one worst retrieval of a run."""
    folder = path / "examples" / evaluation
    folder.mkdir(parents=True)
    listing = {}
    for number, (kind, rank) in enumerate([("best", 1), ("worst", 1234)]):
        (folder / f"{number:03d}.jpg").write_bytes(picture(number))
        retrieved = [{"text": caption, "correct": rank == 1, "score": 0.625}]
        captions = [caption, "second", "third"]
        listing[kind] = [{"image": f"{number:03d}.jpg", "captions": captions, "rank": rank, "retrieved": retrieved}]
    (folder / "examples.json").write_text(json.dumps(listing))
