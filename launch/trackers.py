"""The trackers of accelerate that a recipe names: whether they are there, and with what they start."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from vlm.atomic import write_text
from vlm.errors import UserError, nearest, reason
from vlm.training.trackers import Trackers

_PROJECT = "vlm"
_ID = "wandb-id"


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that accelerate does not know, or that is not installed."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"trackers: {name} is unknown; {nearest(name, map(str, LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise UserError(f"trackers: {name} is not installed here")


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], run: Path, recipe: dict[str, Any], start_step: int
) -> Trackers:
    """The trackers of a run, started at some step.

    Raises:
        UserError: one of them does not start (no account, no network, a folder that cannot be written).
    """
    try:
        accelerator.init_trackers(_PROJECT, init_kwargs=_options(accelerator, names, run, recipe, start_step))
    except Exception as error:  # whatever a tracker's own library raises
        raise UserError(f"trackers: {', '.join(names)}: {type(error).__name__}: {reason(error)}") from None
    return Trackers(accelerator.trackers)


def _options(
    accelerator: Accelerator, names: Sequence[str], run: Path, recipe: dict[str, Any], start_step: int
) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}
    if "tensorboard" in names:
        options["tensorboard"] = {"purge_step": start_step + 1}
    if "wandb" in names and accelerator.is_main_process:
        options["wandb"] = {
            "name": run.resolve().name,
            "id": _stored_id(run / _ID),
            "resume": "allow",
            "dir": str(run),
            "config": recipe,
        }
    return options


def _stored_id(file: Path) -> str:
    """The name under which a run goes on where it stopped: drawn once, kept in the run directory."""
    try:
        name = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if not (name.isascii() and name.isalnum()):
        name = secrets.token_hex(8)
        write_text(file, name + "\n")
    return name
