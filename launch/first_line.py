"""The first line of a start: what a recipe's values and the index of its data say, before torch is imported."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.shards.manifest import NAME, parse_manifest
from data.shards.patterns import expand_shards
from data.shards.store import is_remote
from launch.quick_check import SCHEMA
from vlm.duration import Duration
from vlm.errors import UserError

_GPUS = ("/dev/nvidia0", "/dev/kfd")


def first_line(name: str, values: Mapping[str, Any]) -> str:
    """The model, ranks, device, engine, samples and steps of a recipe whose values no check has found fault with.

    What cannot be known so early (the samples of shards without an index, or far away) is left out.
    """
    defaults = {key: one.get("default") for key, one in json.loads(SCHEMA.read_text())["properties"].items()}
    told = {**defaults, **values}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return (
        f"vlm train {name}: {_model(told['model'])} on {ranks} rank{'s' if ranks > 1 else ''} ({_device()}), engine "
        f"{told['engine']}, precision {told['precision']}; {_data(told)}; loading torch and the model"
    )


def _model(model: Any) -> str:
    """The model's name, or those of its two halves."""
    for key in ("open_clip", "transformers"):
        if isinstance(model, dict) and isinstance(model.get(key), str):
            return f"model {model[key]}"
    if not isinstance(model, dict):
        return "a model"
    if isinstance(halves := model.get("architecture"), dict):
        vision, text = halves.get("vision_cfg"), halves.get("text_cfg")
        image_name = vision.get("timm_model_name", "ViT") if isinstance(vision, dict) else "ViT"
        text_name = text.get("hf_model_name", "transformer") if isinstance(text, dict) else "transformer"
        return f"model {image_name} + {text_name}"
    return "a model of two towers"


def _device() -> str:
    """What the ranks will run on, as far as device files tell."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "GPU" if not hidden and any(map(os.path.exists, _GPUS)) else "CPU"


def _data(told: Mapping[str, Any]) -> str:
    """The size of the data, the steps and the samples of each."""
    batch, samples = told["global_batch"], None
    with suppress(UserError, OSError, ValueError, TypeError, KeyError, AttributeError):
        samples = _num_samples(told["data"])
    each = f"{batch:,} samples a step"
    with suppress(ValueError, AttributeError):
        duration = Duration.parse(told["duration"]) if isinstance(told["duration"], str) else None
        if duration is not None and (samples or duration.unit != "epochs"):
            each = f"{duration.steps(batch, samples or 0):,} steps of {batch:,}"
    return each if samples is None else f"{samples:,} samples, {each}"


def _num_samples(data: Mapping[str, Any]) -> int | None:
    """The samples of all sources, where the index beside the shards tells them at once."""
    total = 0
    if data.get("images", True) is not True or data.get("mode") == "sequential":
        return None
    for source in data["sources"].values():
        patterns = [source["shards"]] if isinstance(source["shards"], str) else source["shards"]
        root = data.get("root")
        if any(map(is_remote, (*patterns, *filter(None, [root])))):
            return None
        for folder, names in _by_folder(expand_shards(patterns, root, "shards")).items():
            file = folder / NAME
            known = parse_manifest(file.read_bytes(), str(file)).shards
            total += sum(known[name].samples for name in names)
    return total


def _by_folder(shards: tuple[str, ...]) -> dict[Path, list[str]]:
    folders: dict[Path, list[str]] = {}
    for shard in map(Path, shards):
        folders.setdefault(shard.parent, []).append(shard.name)
    return folders
