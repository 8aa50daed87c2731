"""The model that a command line names: a checkpoint, a run, a folder of open_clip or transformers, a name."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vlm.checkpoint.folder import MANIFEST, complete_checkpoints
from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.config import first_problem
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.clean_configuration import CONFIG
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.foreign import ForeignFiles, files_beside
from vlm.model.open_clip_folder import read_open_clip_folder
from vlm.paths import shown
from vlm.programs import Program, imported_towers
from vlm.training.model_files import files_of

# A model that is not trained here may have batch norm: in evaluation its statistics stand still anyway.
_NOT_TRAINED: dict[str, Any] = {"freeze_batch_norm": True}


def load_model(name: str, device: torch.device | None = None, *, trust: bool = False) -> DualEncoder:
    """The model in a checkpoint folder, in a run's newest checkpoint, in a folder as open_clip or transformers write
    them, or open_clip's MODEL or MODEL:PRETRAINED_TAG.

    A checkpoint's averaged weights are taken where it has them. Names of other files that stand in one (of a version
    that did not keep them) are followed, and towers of somebody's own imported, with `trust` only. Raises UserError
    when nothing is found under the name.
    """
    path = Path(name)
    if os.path.isdir(name):  # which says False, too, of a name that is too long for any path
        model = _from_folder(path, trust=trust)
    elif path.suffix or "/" in name:
        raise UserError(f"{name:.300}: no such checkpoint or run directory")
    else:
        architecture, _, tag = name.partition(":")
        model = build_model(ModelConfig(open_clip=architecture, pretrained=tag or None, **_NOT_TRAINED))
    return model.to(device or torch.device("cpu")).eval()


def _from_folder(path: Path, *, trust: bool) -> DualEncoder:
    if described := read_open_clip_folder(path):
        config = ModelConfig(architecture=described.architecture, pretrained=str(path), **_NOT_TRAINED)
        return build_model(config, files=ForeignFiles(files_beside(path), trust=trust))
    if (path / CONFIG).is_file():
        return build_model(ModelConfig(transformers=str(path), **_NOT_TRAINED))
    return model_of(_checkpoint_below(path), trust=trust)


def _checkpoint_below(path: Path) -> Checkpoint:
    if (path / MANIFEST).is_file():
        return Checkpoint(path)
    complete = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not complete:
        raise UserError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run with a complete one")
    return Checkpoint(list(complete.values())[-1])


@torch.no_grad()
def model_of(checkpoint: Checkpoint, *, trust: bool = False) -> DualEncoder:
    """The model of a checkpoint with its inference weights."""
    model = empty_model_of(checkpoint, trust=trust)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = checkpoint.inference_weights()
    differences = first_differences(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if differences:
        raise UserError(f"checkpoint {checkpoint.folder} is of another architecture: {differences}")
    model.load_state_dict(weights)
    return model


def empty_model_of(
    checkpoint: Checkpoint, *, trust: bool = False, trusted: Collection[Program] | None = None
) -> DualEncoder:
    """The model that a checkpoint describes, made of nothing but what lies in it, with weights that mean nothing.

    A tower that is somebody's own class is a program. It is imported with `trust`; where `trusted` is given, if it is
    one of these. Raises UserError otherwise.
    """
    described = {"model": checkpoint.manifest.model}
    for program in imported_towers(described):
        if program not in trusted if trusted is not None else not trust:
            raise UserError(
                f"{checkpoint.folder / MANIFEST}: {program.key}: {shown(program.text)} would run as a program; --trust "
                "runs what stands in it"
            )
    try:
        config = ModelConfig.model_validate(checkpoint.manifest.model)
    except ValidationError as error:
        raise UserError(f"{checkpoint.folder / MANIFEST}: model.{first_problem(error, ModelConfig)}") from None
    config = config.model_copy(update={"pretrained": None})
    files = ForeignFiles(files_of(checkpoint), trust=trust)
    try:
        return build_model(config, load_pretrained=False, files=files)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint.folder}: {error}") from error
