"""The model that a command line names: a checkpoint, a run, or an open_clip model."""

from pathlib import Path

import torch
from pydantic import ValidationError

from vlm.config import first_problem
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.training.checkpoint import Checkpoint, first_differences
from vlm.training.checkpoint_folder import MANIFEST, complete_checkpoints


def load_model(name: str, device: torch.device | None = None) -> DualEncoder:
    """The model in a checkpoint folder, in a run's newest checkpoint, or open_clip's MODEL or MODEL:PRETRAINED_TAG.

    A checkpoint's averaged weights are taken where it has them. Raises UserError when nothing is found under the name.
    """
    path = Path(name)
    if path.is_dir():
        model = _from_checkpoint(_checkpoint_below(path))
    elif path.suffix or "/" in name:
        raise UserError(f"{name}: no such checkpoint or run directory")
    else:
        architecture, _, tag = name.partition(":")
        model = build_model(ModelConfig(open_clip=architecture, pretrained=tag or None))
    return model.to(device or torch.device("cpu")).eval()


def _checkpoint_below(path: Path) -> Checkpoint:
    if (path / MANIFEST).is_file():
        return Checkpoint(path)
    complete = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not complete:
        raise UserError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run with a complete one")
    return Checkpoint(list(complete.values())[-1])


@torch.no_grad()
def _from_checkpoint(checkpoint: Checkpoint) -> DualEncoder:
    try:
        config = ModelConfig.model_validate(checkpoint.manifest.model)
    except ValidationError as error:
        raise UserError(f"{checkpoint.folder / MANIFEST}: model.{first_problem(error, ModelConfig)}") from None
    model = build_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = checkpoint.inference_weights()
    differences = first_differences(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if differences:
        raise UserError(f"checkpoint {checkpoint.folder} is of another architecture: {differences}")
    model.load_state_dict(weights)
    return model
