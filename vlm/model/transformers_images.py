"""transformers' image processors as our image specification."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from vlm.config import first_problem
from vlm.errors import UserError, reason
from vlm.model.image_spec import ImageSpec

# The processors of models that were saved without one. (Other models get open_clip's mean and deviation.)
_DEFAULT_PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


class Preprocessing(NamedTuple):
    """The images that a model was made for, and what of its processor a specification cannot say."""

    spec: ImageSpec
    departures: tuple[str, ...]


def image_preprocessing(processor: Mapping[str, Any] | None, model_type: str, image_size: int | None) -> Preprocessing:
    """The steps of the processor saved with a model; `image_size` is what its configuration says.

    Raises UserError for a processor whose numbers make no specification.
    """
    fields: dict[str, Any] = {} if image_size is None else {"size": image_size}
    if processor is None:
        if model_type not in _DEFAULT_PROCESSORS:
            return Preprocessing(ImageSpec(**fields), ())
        # The class's default size is not this model's.
        model_size = {"size": {}, "crop_size": {}, "do_center_crop": model_type == "clip"}
        import transformers  # its processors take half a second to import

        default = getattr(transformers, _DEFAULT_PROCESSORS[model_type])()
        processor = {**default.to_dict(), **model_size}
    departures: list[str] = []
    try:
        fields |= _normalisation(processor)
        fields |= _resizing(processor, fields.get("size"), departures)
        return Preprocessing(ImageSpec.model_validate(fields), tuple(departures))
    except ValidationError as error:
        raise UserError(f"its image processor cannot be followed: {first_problem(error, ImageSpec)}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"its image processor cannot be read: {reason(error)}") from error


def _normalisation(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of values in [0, 1]: (x f - mean) / std = (x/255 - mean/(255 f)) / (std/(255 f))."""
    factor = float(processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 1.0
    unit = 255 * factor
    unit = 1.0 if math.isclose(unit, 1.0, rel_tol=1e-6) else unit
    if not processor.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1 / unit,) * 3}
    normalisation: dict[str, Any] = {}
    for key in ("mean", "std"):
        values = processor.get(f"image_{key}")
        if values is not None:
            values = [values] * 3 if isinstance(values, int | float) else values
            normalisation[key] = tuple(float(value) / unit for value in values)
    return normalisation


def _resizing(processor: Mapping[str, Any], model_size: int | None, departures: list[str]) -> dict[str, Any]:
    """Size, mode and interpolation; what they cannot say goes to `departures`."""
    steps = [key for key, on in processor.items() if key.startswith("do_") and on is True and key not in _KNOWN_STEPS]
    departures += [f"{step} is left out" for step in steps]
    resizing: dict[str, Any] = {}
    resample = processor.get("resample")
    if resample is not None:
        if int(resample) not in _RESAMPLING:
            departures.append(f"resample {int(resample)} becomes bicubic")
        resizing["interpolation"] = _RESAMPLING.get(int(resample), "bicubic")
    size, crop = _extents(processor.get("size")), _extents(processor.get("crop_size"))
    cropped = bool(processor.get("do_center_crop"))
    if not processor.get("do_resize", True):
        departures.append("pictures are resized although it says do_resize: false")
    if "longest_edge" in size and "shortest_edge" not in size:
        departures.append("size: longest_edge becomes the shortest edge")
    squashed = not cropped and "shortest_edge" not in size and ("height" in size or not size)
    resizing["resize_mode"] = "squash" if squashed and processor.get("size") is not None else "shortest"
    view = (crop if cropped else size) or size
    extents = {view[key] for key in ("height", "width", "shortest_edge") if key in view}
    if len(extents) > 1:
        departures.append(f"pictures of {view['height']} x {view['width']} become square")
    resized = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
    if cropped and extents and resized and resized != extents:
        departures.append(f"pictures are resized to {max(extents)} before the crop, not to {max(resized)}")
    if extents and model_size is None:
        resizing["size"] = max(extents)
    elif extents and extents != {model_size}:
        departures.append(f"pictures become {model_size} pixels wide, as the model says, not {max(extents)}")
    return resizing


def _extents(size: Any) -> dict[str, int]:
    """`size` or `crop_size` of a processor: a number, or a mapping."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(value) for key, value in size.items() if value is not None}
