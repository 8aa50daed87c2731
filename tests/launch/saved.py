"""A checkpoint of a model as a run writes it, without the run."""

from pathlib import Path
from typing import Any

from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.writer import Group, write_checkpoint
from vlm.distributed.world import World
from vlm.model.dual_encoder import DualEncoder
from vlm.training.model_files import MODEL_FILES, file_group


def save_checkpoint(folder: Path, model: DualEncoder, config: dict[str, Any] | None = None) -> Path:
    """The model after step 1 of a run in `folder`; the checkpoint's own folder. `config` is put in place of its own."""
    manifest = Manifest(
        step=1,
        samples=8,
        num_updates=1,
        world_size=1,
        engine="ddp",
        threads=1,
        model=config or model.config.model_dump(mode="json"),
        data={"pairs": 8},
        versions={},
    )
    weights = model.state_dict()
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    groups: dict[str, Group] = {"weights": (sizes, weights.__getitem__)}
    if model.files:
        groups[MODEL_FILES] = file_group(model.files)
    return write_checkpoint(folder / "checkpoints", manifest, groups, World())
