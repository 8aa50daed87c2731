"""The manifest of a checkpoint: what it holds and where it comes from, in JSON that carries a checksum of its own."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from vlm.attention_choice import MeasuredAttention
from vlm.checkpoint.data_record import DataRecord
from vlm.checkpoint.folder import MANIFEST, step_of
from vlm.config import Config, first_problem
from vlm.errors import UserError
from vlm.sealed import is_sealed, read_json_object

FORMAT = "vlm-checkpoint-3"  # tensors may be in parts since 3
_FORMAT = re.compile(r"vlm-checkpoint-(\d{1,9})")
_UNSEALED = "vlm-checkpoint-1"  # whose manifest carries no checksum of its own

FileName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*-\d{5,9}\.safetensors$")]


class FileRecord(Config):
    """Size and checksum of one file of a checkpoint."""

    bytes: NonNegativeInt
    sha256: str


class LeftOut(Config):
    """How many steps a run has left out: no finite loss or gradient, a spike, or undone by a roll-back."""

    total: int = Field(default=0, ge=0, description="since the run's first step")
    in_a_row: int = Field(default=0, ge=0, description="not finite, up to the checkpoint's step")


class Stretch(Config):
    """Steps of a run, counted from 1, the last among them."""

    first: PositiveInt
    last: PositiveInt


class SpikeRecord(Config):
    """What the guard goes on from, and which steps' batches are not in the weights for its sake."""

    losses: tuple[float, ...] = Field(default=(), description="of the last usual steps")
    norms: tuple[float, ...] = Field(default=(), description="of their gradients")
    spikes: tuple[PositiveInt, ...] = Field(default=(), description="steps of the last spikes, those undone among them")
    left_out: tuple[Stretch, ...] = Field(default=(), description="steps left out or undone for spikes")


class Manifest(Config):
    """The contents of a checkpoint and where it comes from; all but the tensors."""

    format: str = FORMAT
    step: NonNegativeInt
    samples: NonNegativeInt
    num_updates: NonNegativeInt
    world_size: int
    engine: str
    threads: int
    attention: tuple[MeasuredAttention, ...] = Field(
        default=(), description="measured at the run's start, by which it goes on; none where the recipe says how"
    )
    model: dict[str, Any]
    data: dict[str, DataRecord]
    stream: dict[str, Any] = Field(default={}, description="what the data must remember besides the step")
    left_out: LeftOut = Field(default=LeftOut(), description="steps that changed nothing, or were undone")
    spikes: SpikeRecord = Field(default=SpikeRecord(), description="of the guard, where there is one")
    counts: dict[str, int] = Field(default={}, description="rows of each source and field since the last log line")
    pending: tuple[str, ...] = Field(
        default=(), description="evaluations of this step that a stop left to the next life"
    )
    versions: dict[str, str]
    files: dict[FileName, FileRecord] = Field(default={})


class NewerCheckpointError(UserError):
    """A checkpoint that a newer version of this program wrote: whole, but not to be read here."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: the folder holds none, or it is damaged.
        NewerCheckpointError: a newer version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    values = read_json_object(path)
    form = str(values.get("format"))
    known = _FORMAT.fullmatch(form)
    if known is None:
        raise UserError(f"{path}: format {form!r} is not {FORMAT!r}")
    if int(known[1]) > int(FORMAT.rpartition("-")[2]):
        raise NewerCheckpointError(f"{path}: a newer version of vlm wrote it ({form}; this one reads up to {FORMAT})")
    if form != _UNSEALED and not is_sealed(path):
        raise UserError(f"{path} is damaged: the checksum in its last line is missing")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise _misread(path, form, error) from None
    named = step_of(folder)
    if named is not None and named != manifest.step:
        raise UserError(f"{path} is of step {manifest.step}: the folder was renamed, or holds another's manifest")
    return manifest


def _misread(path: Path, form: str, error: ValidationError) -> UserError:
    """The words on a manifest that is JSON and fits its checksum, if it has one, but not this version."""
    problem = first_problem(error, Manifest)
    if form != _UNSEALED and all(detail["type"] == "extra_forbidden" for detail in error.errors(include_url=False)):
        return NewerCheckpointError(f"{path}: a newer version of vlm wrote it ({problem})")
    return UserError(f"{path} is not a readable manifest: {problem}")
