"""What is read of a transformers model beside its weights: a few small files, from which nothing can run or lead away.

A folder or hub repository is somebody else's. Its configuration may name code, kernels, other repositories and other
files; all that is taken out here (`auto_map`, paths) or refused by name, and the library sees a temporary folder with
the rest. The same files lie in our checkpoints, which therefore need the folder no more.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from open_clip import get_model_config, list_models
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging as library_logging
from transformers.utils.hub import cached_file

from vlm.errors import UserError, nearest, reason

Part = Literal["image", "text"]
CONFIG = "config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Of one of these a tokenizer is made; without them the library makes one that knows its special tokens only.
VOCABULARIES = (
    TOKENIZER_JSON,
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", TOKENIZER_CONFIG)
_TOKENIZER = "tokenizer."
_LOAD_ERRORS = (
    *(
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ),
    SafetensorError,
)
_MOST_BYTES = 256 << 20
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
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ForeignFiles:
    """Where towers get the configurations and tokenizers that they are made of, and which of these they have used.

    `saved` are the files of a checkpoint (or of an exported folder) by the names that `used` has; without them they are
    read where the names in the configuration say. With them a name is followed only with `trust`, or where open_clip
    itself names it: it stands in a file that may come from anywhere.
    """

    def __init__(self, saved: Mapping[str, bytes] | None = None, *, trust: bool = False) -> None:
        self._saved = saved
        self._trust = trust
        self.used: dict[str, bytes] = {}
        self.notices: list[str] = []  # what of these files cannot be followed

    def configuration(self, part: Part, name: str) -> PreTrainedConfig:
        """The configuration of the model called `name`, without anything that is code.

        Raises UserError when there is none, or when it is of a model that is not transformers' own.
        """
        key = f"{part}.{CONFIG}"
        content = self._saved_or_none(key)
        if content is None:
            self._require_trusted(key, name)
            content = _read(name, CONFIG)
            if content is None:
                raise UserError(f"{name}: there is no {CONFIG}")
        values = _without_code(_parsed(content, f"{name}/{CONFIG}"))
        self.used[key] = _json(values)
        return as_configuration(values, name)

    def tokenizer(self, name: str) -> dict[str, bytes]:
        """The files of the tokenizer called `name`. Raises UserError when no vocabulary is among them."""
        saved = {
            key.removeprefix(_TOKENIZER): content
            for key, content in (self._saved or {}).items()
            if key.removeprefix(_TOKENIZER) in (*_TOKENIZER_FILES, CONFIG) and key.startswith(_TOKENIZER)
        }
        if not saved:
            self._require_trusted(_TOKENIZER.rstrip("."), name)
            found = {file: _read(name, file) for file in (*_TOKENIZER_FILES, CONFIG)}
            saved = {file: content for file, content in found.items() if content}
        if not any(file in saved for file in VOCABULARIES):
            raise UserError(f"{name} holds no tokenizer ({', '.join(VOCABULARIES[:3])}, ...): name one that does")
        for file in (CONFIG, TOKENIZER_CONFIG):
            if file in saved:
                saved[file] = _json(_without_code(_parsed(saved[file], f"{name}/{file}"), refuse=False))
        self.used |= {_TOKENIZER + file: content for file, content in saved.items()}
        return saved

    def image_processor(self, name: str) -> dict[str, Any] | None:
        """What the image processor of the model does, by transformers' keys; None where none was saved with it."""
        self._require_trusted("image processor", name)
        nested = _read(name, _PROCESSOR)
        if nested is not None:
            values = _parsed(nested, f"{name}/{_PROCESSOR}").get("image_processor")
            if isinstance(values, dict):
                return values
        content = _read(name, IMAGE_PROCESSOR)
        return None if content is None else _parsed(content, f"{name}/{IMAGE_PROCESSOR}")

    def _saved_or_none(self, key: str) -> bytes | None:
        return None if self._saved is None else self._saved.get(key)

    def _require_trusted(self, what: str, name: str) -> None:
        if self._saved is None or self._trust or name in names_of_open_clip():
            return
        raise UserError(f"the model's {what} does not lie with it but in {name!r}: --trust reads it there")


def files_beside(folder: Path) -> dict[str, bytes]:
    """The files of a text model and its tokenizer that lie in an exported folder, named as in `ForeignFiles.used`."""
    found = {file: _read(str(folder), file) for file in (*_TOKENIZER_FILES, CONFIG)}
    named = {_TOKENIZER + file: content for file, content in found.items() if content}
    if content := found[CONFIG]:
        named[f"text.{CONFIG}"] = content
    return named


def write_beside(folder: Path, used: Mapping[str, bytes]) -> None:
    """Write such files into a folder, so that `files_beside` finds them there."""
    for key, content in used.items():
        if key.startswith(_TOKENIZER):
            (folder / key.removeprefix(_TOKENIZER)).write_bytes(content)
    if text := used.get(f"text.{CONFIG}"):
        (folder / CONFIG).write_bytes(text)


def require_readable_weights(name: str) -> None:
    """Raise UserError for weights that are only a part of a model, or whose index leads out of the folder."""
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{name} holds an adapter, not a whole model: merge it into its model first")
    for index in folder.glob("*.index.json"):
        parts = _parsed(_limited(index), str(index)).get("weight_map", {})
        named = parts.values() if isinstance(parts, dict) else [parts]
        if not all(isinstance(part, str) and part == Path(part).name for part in named):
            raise UserError(f"{index} names files outside its folder")


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
    except (StrictDataclassError, *_LOAD_ERRORS) as error:
        raise UserError(f"{name}: its {CONFIG} is impossible: {reason(error)}") from error


def _require_possible(values: Mapping[str, Any], name: str) -> None:
    """Raise UserError for sizes that would fill the memory, or take for ever, before they are refused."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_possible(value, name)
        most = next((most for part, most in _MOST.items() if part in key), 2**31)
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
    """Whatever the library raises about the files of the model called `name`, as one line that begins with `where`."""
    try:
        yield
    except UserError as error:
        told = str(error).removeprefix(f"{name}: ")
        raise UserError(told if told.startswith("towers.") else f"{where} {name}: {told}") from error
    except UnpicklingError as error:
        raise UserError(
            f"{where} {name}: its weights are a pickle of more than tensors, which could run code"
        ) from error
    except (StrictDataclassError, *_LOAD_ERRORS) as error:
        raise UserError(f"{where} {name}: {reason(error)}") from error


@contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files."""
    with tempfile.TemporaryDirectory(prefix="vlm-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def _without_code(values: dict[str, Any], where: str = "", *, refuse: bool = True) -> dict[str, Any]:
    """The same without names of code and files; with `refuse`, an address in another value is an error."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in _LEFT_OUT or _NAMES_FILES.search(key):
            continue
        if key == "quantization_config" and value:
            raise UserError(f"{where}{key}: quantised weights are not read")
        if isinstance(value, dict):
            value = _without_code(value, f"{where}{key}.", refuse=refuse)
        elif refuse and isinstance(value, str) and _ADDRESS.search(value):
            raise UserError(f"{CONFIG}: {where}{key}: {ascii(value)[:80]} leads out of the model, and is not followed")
        kept[key] = value
    return kept


def _read(name: str, file: str) -> bytes | None:
    """One file of a local folder or of a hub repository; None where it is not there."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / file
        return _limited(path) if path.is_file() else None
    if not is_hub_name(name):
        raise UserError(f"{name}: no such folder")
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {reason(error)}") from error
    return None if found is None else _limited(Path(found))


def _limited(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than any tokenizer or configuration")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable as JSON: {reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a JSON object is needed, found {type(values).__name__}")
    return values


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True).encode()


def is_hub_name(name: str) -> bool:
    """Whether the hub may have something under this name."""
    return _NAME.fullmatch(name) is not None


def names_of_open_clip() -> frozenset[str]:
    """The Hugging Face models and tokenizers that open_clip's own configurations name."""
    texts = [get_model_config(name)["text_cfg"] for name in list_models()]
    return frozenset(text[key] for text in texts for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key))
