"""Object detectors of transformers, from a folder in which nothing can run: pictures to counts of each class."""

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from vlm.errors import UserError, nearest, reason
from vlm.model.clean_configuration import CONFIG, as_configuration, quiet, refusing, without_code
from vlm.model.foreign import IMAGE_PROCESSOR, ForeignFiles, folder_of, stored_configuration
from vlm.model.identity import weights_identity
from vlm.model.transformers_models import load

_KINDS: Final = frozenset(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)
# Of these a name of timm means its network, made here; of others the library would ask the hub what it means.
_WITH_TIMM: Final = {
    *("detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer"),
    "timm_backbone",
}
_MOST_CLASSES: Final = 100_000
_LONGEST_NAME: Final = 100
_MOST_PIXELS: Final = 1 << 14  # of a side
_COUNTER: Final = "num_batches_tracked"  # of a batch norm: nothing that is detected depends on it

_BLANK: Final = np.full((480, 640, 3), 128, dtype=np.uint8)

Prepared = dict[str, Tensor]
"""A picture as a detector takes it: `pixel_values` [1, 3, height, width], and `pixel_mask` where it wants one."""


class UndetectableError(Exception):
    """Pictures in which a detector cannot look for objects; the text says why."""


class Detector:
    """A detector: it counts the objects of each class in pictures of one prepared size.

    `names` are those of its classes, by number. `identity` names weights, configuration and image processor, on which
    its counts depend.
    """

    def __init__(self, model: Any, processor: Any, names: Mapping[int, str], where: str) -> None:
        self._model = model.eval()
        self._names = names
        self._processor = processor
        self._where = where
        self._inputs = {"pixel_values", "pixel_mask"} & set(inspect.signature(model.forward).parameters)
        described = json.dumps([model.config.to_diff_dict(), processor.to_dict()], sort_keys=True, default=str)
        self.identity = hashlib.blake2b((weights_identity(model) + described).encode(), digest_size=16).hexdigest()

    def prepared(self, pixels: UInt8[ndarray, "height width 3"]) -> Prepared:
        """A picture by the detector's own image processor. Raises UndetectableError for one that it cannot take."""
        with self._failing():
            made = self._processor(images=pixels, return_tensors="pt", input_data_format="channels_last")
            return {name: made[name] for name in self._inputs if name in made}

    @torch.no_grad()
    def counts(self, pictures: Sequence[Prepared], min_score: float) -> list[dict[str, int]]:
        """For each picture how many objects of each class that has any have at least that score.

        The pictures are of one prepared size, so that none is padded.

        Raises:
            UndetectableError: the detector cannot take this size, or finds scores that are no numbers.
            UserError: the memory is too small for so many.
        """
        with self._failing():
            device = self._model.device
            inputs = {name: torch.cat([one[name] for one in pictures]).to(device) for name in pictures[0]}
            outputs = self._model(**inputs)
            if not outputs.logits.isfinite().all():
                raise UndetectableError("the detector's scores are no numbers")
            sizes = [tuple(inputs["pixel_values"].shape[2:])] * len(pictures)
            found = self._processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            labels = [one["labels"][one["scores"] >= min_score] for one in found]
            return [dict(Counter(self._names.get(label, str(label)) for label in one.tolist())) for one in labels]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Any error of the library about pictures, as one line."""
        try:
            yield
        except UndetectableError:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UserError(f"{self._where}: the memory is too small; say --batch-size") from error
        except torch.AcceleratorError:  # after which nothing works
            raise
        except Exception as error:  # whatever a processor or a network of any kind may raise
            raise UndetectableError(f"the detector fails: {reason(error)}") from error


def require_folder(folder: Path, where: str) -> None:
    """Raise UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{where} {folder}: there is no such folder")


def load_detector(folder: Path, where: str, device: torch.device | None = None) -> Detector:
    """The detector in a local folder: its configuration cleaned of code, its weights from safetensors alone.

    It is tried on a picture, so that what never works is told at once.

    Raises:
        UserError: it begins with `where`; there is no detector, or something in it leads out of the folder.
    """
    name = str(folder)
    require_folder(folder, where)
    with refusing(where, name):
        if not any(folder.glob("*.safetensors")):
            raise UserError("holds no weights as safetensors; others are not read, because they can run code")
        configuration = _configuration(name)
        processor = _processor(name, configuration)
        model, missing = load(
            name,
            configuration,
            pretrained=True,
            cls=AutoModelForObjectDetection,
            use_safetensors=True,
            local_files_only=True,
        )
        _require_whole(model, missing)
        detector = Detector(model.to(device or torch.device("cpu")), processor, _class_names(name), f"{where} {name}")
        try:
            detector.counts([detector.prepared(_BLANK)], 0.0)
        except UndetectableError as error:
            raise UserError(f"of a grey picture, {error}") from error
        return detector


def _configuration(name: str) -> PreTrainedConfig:
    stored = stored_configuration(name)
    kind = stored.get("model_type")
    if kind not in _KINDS:
        raise UserError(f"model_type {kind!r} detects no objects ({nearest(str(kind), _KINDS)})")
    values = without_code(stored)
    _require_own_backbone(values, str(kind))
    labels = stored.get("id2label")
    if isinstance(labels, Mapping):  # left out, since it only describes; but it says how many classes there are
        if len(labels) > _MOST_CLASSES:
            raise UserError(f"{CONFIG}: id2label: found {len(labels):,} classes; at most {_MOST_CLASSES:,} can be")
        values["num_labels"] = len(labels)
    return as_configuration(values, name)


def _class_names(name: str) -> dict[int, str]:
    """The names of classes that differ from all others; the others go by their number."""
    labels = stored_configuration(name).get("id2label")
    texts = {key: _as_text(text) for key, text in labels.items()} if isinstance(labels, Mapping) else {}
    times = Counter(texts.values())
    return {int(key): text for key, text in texts.items() if key.isdecimal() and times[text] == 1}


def _as_text(stored: Any) -> str:
    return str(stored)[:_LONGEST_NAME].encode("utf-8", "replace").decode()


def _require_own_backbone(values: dict[str, Any], kind: str) -> None:
    """Raise UserError for a backbone that lies elsewhere; its weights are with the detector's in any case."""
    for inner in values.values():
        if isinstance(inner, dict):
            _require_own_backbone(inner, str(inner.get("model_type")))
    values.pop("use_pretrained_backbone", None)
    if values.get("backbone_config") is not None:
        values.pop("backbone", None)
    backbone = values.get("backbone")
    if backbone is None:
        return
    is_ours = isinstance(backbone, str) and values.get("use_timm_backbone", True) and timm.is_model(backbone)
    if kind not in _WITH_TIMM or not is_ours or values.get("backbone_kwargs"):
        raise UserError(f"{CONFIG}: backbone: {str(backbone)[:80]!r} lies elsewhere, and is not followed")


def _processor(name: str, configuration: PreTrainedConfig) -> Any:
    stored = ForeignFiles().image_processor(name)
    if stored is None:
        raise UserError(f"there is no {IMAGE_PROCESSOR}")
    values = without_code(stored)
    _require_possible(values, "")
    files = {IMAGE_PROCESSOR: json.dumps(values).encode(), CONFIG: configuration.to_json_string().encode()}
    with folder_of(files) as folder, quiet():
        processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if not hasattr(processor, "post_process_object_detection"):
        raise UserError(f"its image processor, {type(processor).__name__}, is none of a detector")
    return processor


def _require_possible(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a picture that would fill the memory."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_possible(value, f"{where}{key}.")
        elif "size" in f"{where}{key}" and isinstance(value, int | float) and not 0 <= value <= _MOST_PIXELS:
            raise UserError(f"{IMAGE_PROCESSOR}: {where}{key}: found {value}; at most {_MOST_PIXELS:,} is possible")


def _require_whole(model: Any, missing: set[int]) -> None:
    """Raise UserError for a weight of which the files hold nothing: it would be random, silently."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in missing and not name.endswith(_COUNTER):
            raise UserError(f"its files hold no weights for {name}")
