"""`vlm join`: several trained models as one checkpoint, whose similarity is the mean of theirs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from launch.facts import package_versions
from launch.model_source import load_model
from vlm.aside import folder_aside
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.writer import Group, write_checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.dual_encoder import DualEncoder
from vlm.model.join import join
from vlm.paths import new_folder
from vlm.training.model_files import MODEL_FILES, file_group

CHECKPOINTS = "checkpoints"


def join_models(names: Sequence[str], out: Path, *, trust: bool = False) -> DualEncoder:
    """Write the models called `names`, side by side, as the only checkpoint of the new folder `out`.

    For `trust` see `load_model`. Raises UserError where they cannot be one, or the folder cannot be written.
    """
    out = new_folder(out, "--out")
    if len(names) < 2:
        raise UserError(f"{names[0]} alone is one model already; name two or more")
    # One and the same model may be named twice: messages tell them apart by their places.
    labels = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]
    joined = join({label: load_model(name, trust=trust) for label, name in zip(labels, names, strict=True)})
    manifest = Manifest(
        step=0,
        samples=0,
        num_updates=0,
        world_size=1,
        engine="ddp",
        threads=torch.get_num_threads(),
        model=joined.config.model_dump(mode="json"),
        data={},
        versions=package_versions(),
    )
    weights = joined.state_dict()
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    groups: dict[str, Group] = {"weights": (sizes, weights.__getitem__)}
    if joined.files:
        groups[MODEL_FILES] = file_group(joined.files)
    try:
        with folder_aside(out) as aside:
            (aside / CHECKPOINTS).mkdir()
            write_checkpoint(aside / CHECKPOINTS, manifest, groups, World())
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    return joined
