"""Export a model and prove, with the other system, that it computes the same."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from data.config import DataConfig
from data.heldout import HeldOutSet
from data.shards.cache import ShardCache
from launch.model_source import load_model
from vlm.errors import UserError, nearest
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import Parity, export_open_clip
from vlm.training.run_directory import RECIPE
from vlm.world import World

FORMATS = ("open_clip",)
NUM_CHECKED = 16  # samples on which both systems are compared


def export_model(name: str, to: str, folder: Path, data: Sequence[str], *, before_head: bool = False) -> Parity:
    """Write the model called `name` to the new folder `folder` in the format `to`, and return how equal it is there.

    The parity is measured on the first samples of `data`, or else of the shards that the checkpoint's run trained on.
    `before_head` leaves out the projection heads.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: unknown format; {nearest(to, FORMATS)}")
    model = load_model(name)
    if before_head:
        model.drop_heads()
    samples = _samples(model, Path(name), data)
    (batch,) = samples.batches(World(), len(samples))
    captions = [caption for group in samples.captions for caption in group]
    return export_open_clip(model, folder, batch.images[batch.valid], captions)


def _samples(model: DualEncoder, path: Path, data: Sequence[str]) -> HeldOutSet:
    if data:
        return HeldOutSet(data, model.image_spec, limit=NUM_CHECKED, where="--data")
    # A checkpoint lies at RUN/checkpoints/step-N.
    recipe = next((folder / RECIPE for folder in (path, *path.parents[:2]) if (folder / RECIPE).is_file()), None)
    if recipe is None:
        raise UserError(f"{path} belongs to no run whose data could check the export; name some shards by --data")
    config = DataConfig.model_validate(yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"])
    source = next(iter(config.sources.values()))
    cache = ShardCache(config.cache, config.retry)
    return HeldOutSet(
        source.patterns, model.image_spec, root=config.root, limit=NUM_CHECKED, cache=cache, where=str(recipe)
    )
