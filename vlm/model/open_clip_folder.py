"""A folder as open_clip publishes models in: weights beside the description of the model and of its images."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config import first_problem
from vlm.errors import UserError, reason
from vlm.model.config import Architecture
from vlm.model.image_spec import ImageSpec

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class OpenClipFolder:
    """The description of a model in a folder, and how its images look (fields of `ImageSpec`, but the size)."""

    architecture: Architecture
    preprocessing: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """The other settings that the weights were trained with, by the keys of open_clip's records of its tags."""
        return {**self.preprocessing, "quick_gelu": self.architecture.quick_gelu}


def read_open_clip_folder(folder: Path) -> OpenClipFolder | None:
    """The description of the model in a folder; None where there is none. Raises UserError for a bad one."""
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON: {reason(error)}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: a JSON object is needed, found {type(content).__name__}")
    try:
        architecture = Architecture.model_validate(content.get("model_cfg", content))
    except ValidationError as error:
        raise UserError(f"{path}: model_cfg: {first_problem(error, Architecture)}") from None
    return OpenClipFolder(architecture, _preprocessing(path, content.get("preprocess_cfg") or {}))


def _preprocessing(path: Path, fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise UserError(f"{path}: preprocess_cfg: a JSON object is needed, found {type(fields).__name__}")
    if fields.get("mode", "RGB") != "RGB":
        raise UserError(f"{path}: preprocess_cfg.mode: {fields['mode']!r} is not RGB")
    if fields.get("resize_mode") == "longest" and fields.get("fill_color", 0) != 0:
        raise UserError(
            f"{path}: preprocess_cfg.fill_color: {fields['fill_color']!r}; only black borders are made here"
        )
    named = ("mean", "std", "interpolation", "resize_mode")
    values = {name: fields[name] for name in named if fields.get(name) is not None}
    for name in ("mean", "std"):
        if isinstance(values.get(name), int | float):
            values[name] = [values[name]] * 3
    try:
        spec = ImageSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: preprocess_cfg: {first_problem(error, ImageSpec)}") from None
    return {name: getattr(spec, name) for name in values}
