"""`vlm gap`: what the images and texts of a model differ by, in a file for a decoder that trains on texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from eval.captioned import CaptionedImages
from eval.encoder import evaluation_mode
from eval.evaluator import EvaluationContext
from eval.shards import CaptionedEvaluationConfig
from launch.agreement import require_same_view
from launch.evaluate import PATIENCE, evaluator_config, loaded_model
from vlm.model.gap_statistics import GapStatistics, weights_of
from vlm.paths import output_file
from vlm.terminal import Terminal

_OPTIONS = {"shards": "SHARDS"}


def captioned_images(shards: Sequence[str], **options: Any) -> CaptionedEvaluationConfig:
    """The keys of held-out shards with captions, as any evaluator has them; those that are None were not given."""
    config = evaluator_config("retrieval", shards=tuple(shards), **options)
    assert isinstance(config, CaptionedEvaluationConfig)
    return config


def write_gap(
    name: str, config: CaptionedEvaluationConfig, out: Path, *, trust: bool = False, patience: float = PATIENCE
) -> dict[str, float]:
    """Embed the samples of shards, each image with each of its captions a pair, and write the pairs' statistics.

    Prints a table of figures, which are returned. On all ranks that a launcher started.

    Raises:
        UserError: no such model, shards without captioned images, or a file that cannot be written.
    """
    out = output_file(out, "--out")
    with loaded_model(name, patience, trust=trust) as (model, world):
        captioned = CaptionedImages(config, EvaluationContext(model.image_spec, model.tokenizer, options=_OPTIONS))
        require_same_view(world, {"SHARDS": captioned.held_out.record})
        with evaluation_mode(model) as encoder:
            embedded = captioned.embed(encoder, world)
        rows = torch.searchsorted(embedded.image_owners, embedded.text_owners)
        images, texts = embedded.images[rows], embedded.texts
        statistics = GapStatistics.of(images, texts)
        variance = float(statistics.covariance.trace()) / len(statistics.shift)
        figures = {
            "pairs": float(len(texts)),
            "images": float(len(embedded.images)),
            "mean cosine of a pair": float((images.double() * texts.double()).sum(1).mean()),
            "distance of the centroids": float(statistics.shift.norm()),
            "noise as long as the mean difference": float(statistics.shift.norm()) / len(statistics.shift) ** 0.5,
            "noise as long as differences about their mean": variance**0.5,
        }
        if world.is_main:
            statistics.write(out, weights_of(model), "--out")
            _print(name, figures)
        world.barrier()
    return figures


def _print(name: str, figures: dict[str, float]) -> None:
    table = Table("what", title=f"images and texts of {name}")
    table.add_column("value", justify="right")
    for what, value in figures.items():
        table.add_row(what, f"{value:,.0f}" if value.is_integer() else f"{value:.4f}")
    Terminal().print(table)
