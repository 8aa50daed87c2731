"""A checkpoint of a model as a run writes it, without the run."""

from pathlib import Path

from vlm.model.dual_encoder import DualEncoder
from vlm.training.checkpoint import Manifest, write_checkpoint
from vlm.world import World


def save_checkpoint(folder: Path, model: DualEncoder) -> Path:
    """The model after step 1 of a run in `folder`; the checkpoint's own folder."""
    manifest = Manifest(
        step=1,
        samples=8,
        num_updates=1,
        world_size=1,
        engine="ddp",
        threads=1,
        model=model.config.model_dump(mode="json"),
        data={"pairs": 8},
        versions={},
    )
    weights = model.state_dict()
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    return write_checkpoint(folder / "checkpoints", manifest, {"weights": (sizes, weights.__getitem__)}, World())
