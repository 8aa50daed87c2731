"""A transformers configuration without anything that runs or leads away, and the library's errors as one line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging as library_logging

from vlm.errors import UserError, nearest, reason

CONFIG = "config.json"
# By a part of the key.
_MOST = {"layers": 1024, "heads": 1024, "vocab_size": 2**24, "position": 2**20, "size": 65536, "dim": 65536}

# Names of code, of other files, and what only describes.
_LEFT_OUT = {
    *("auto_map", "custom_pipelines", "trust_remote_code", "attn_implementation", "_attn_implementation"),
    *("experts_implementation", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "chat_template"),
    *("id2label", "label2id", "task_specific_params", "finetuning_task", "init_inputs", "processor_class"),
    *("device_map", "cache_dir", "feature_extractor_type", "license", "_commit_hash"),
}
_NAMES_FILES = re.compile(r"_(files?|path|dir|spm)$|^(vocab|merges)$")
_ADDRESS = re.compile(r"[/\\:]|^~|^\.")


def without_code(values: dict[str, Any], where: str = "", *, refuse: bool = True) -> dict[str, Any]:
    """The same without names of code and files; with `refuse`, an address in another value is an error."""
    cleaned: dict[str, Any] = {}
    for key, value in values.items():
        if key in _LEFT_OUT or _NAMES_FILES.search(key):
            continue
        if key == "quantization_config" and value:
            raise UserError(f"{where}{key}: quantised weights are not read")
        if isinstance(value, dict):
            value = without_code(value, f"{where}{key}.", refuse=refuse)
        elif refuse and isinstance(value, str) and _ADDRESS.search(value):
            raise UserError(f"{CONFIG}: {where}{key}: {ascii(value)[:80]} leads out of the model, and is not followed")
        cleaned[key] = value
    return cleaned


def as_configuration(values: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """transformers' own configuration object of these values, which the model called `name` has."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        known = nearest(str(kind), CONFIG_MAPPING.keys())
        raise UserError(f"{name}: model_type {kind!r} is not transformers' own (code of a model is never run); {known}")
    _require_possible(values, name)
    try:
        with quiet():
            return CONFIG_MAPPING[kind].from_dict(dict(values))
    except Exception as error:  # its strict dataclasses and its parts in Rust raise children of Exception itself
        raise UserError(f"{name}: its {CONFIG} is impossible: {reason(error)}") from error


def _require_possible(values: Mapping[str, Any], name: str) -> None:
    """Raise UserError for sizes that would fill the memory, or take for ever, before they are refused."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_possible(value, name)
        most = next((most for word, most in _MOST.items() if word in key), 2**31)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int | float) and not abs(number) <= most for number in numbers):
            raise UserError(f"{name}: {CONFIG}: {key}: found {str(value)[:40]}; at most {most:,} is possible")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars, tables of keys and doubts about configurations."""
    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


@contextmanager
def refusing(where: str, name: str) -> Iterator[None]:
    """Any error of the library about the files of the model called `name`, as one line that begins with `where`."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix(f"{name}: ")
        raise UserError(
            message if message.startswith(("towers.", "model.")) else f"{where} {name}: {message}"
        ) from error
    except UnpicklingError as error:
        raise UserError(
            f"{where} {name}: its weights are a pickle of more than tensors, which could run code"
        ) from error
    except Exception as error:  # its strict dataclasses and its parts in Rust raise children of Exception itself
        raise UserError(f"{where} {name}: {reason(error)}") from error
