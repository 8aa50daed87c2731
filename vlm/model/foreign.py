"""The files of a transformers model beside its weights: a few small files, from which nothing can run or lead away.

A folder or hub repository is somebody else's. Its configuration may name code, kernels, other repositories and other
files; all that is taken out here (`auto_map`, paths) or refused by name, and the library sees a temporary folder with
the rest. The same files lie in our checkpoints, which therefore need the folder no more.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from open_clip import get_model_config, list_models
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from vlm.errors import UserError, reason
from vlm.model.clean_configuration import CONFIG, as_configuration, without_code
from vlm.model.shipped_tokenizers import SHIPPED, shipped_tokenizer

TowerName = Literal["image", "text"]
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
_MOST_BYTES = 256 << 20

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

    def configuration(self, tower_name: TowerName, name: str) -> PreTrainedConfig:
        """The configuration of the model called `name`, without anything that is code.

        Raises UserError when there is none, or when it is of a model that is not transformers' own.
        """
        key = f"{tower_name}.{CONFIG}"
        content = self._saved_or_none(key)
        if content is None:
            self._require_trusted(key, name)
            stored = stored_configuration(name)
        else:
            stored = _parsed(content, f"{name}/{CONFIG}")
        values = without_code(stored)
        self.used[key] = _json(values)
        return as_configuration(values, name)

    def tokenizer(self, name: str) -> dict[str, bytes]:
        """The files of the tokenizer called `name`. Raises UserError when no vocabulary is among them."""
        saved = {
            key.removeprefix(_TOKENIZER): content
            for key, content in (self._saved or {}).items()
            if key.removeprefix(_TOKENIZER) in (*_TOKENIZER_FILES, CONFIG) and key.startswith(_TOKENIZER)
        }
        if not saved and name.startswith(SHIPPED):
            saved = shipped_tokenizer(name)
        elif not saved:
            self._require_trusted(_TOKENIZER.rstrip("."), name)
            contents = {file: _read(name, file) for file in (*_TOKENIZER_FILES, CONFIG)}
            saved = {file: content for file, content in contents.items() if content}
        if not any(file in saved for file in VOCABULARIES):
            raise UserError(f"{name} holds no tokenizer ({', '.join(VOCABULARIES[:3])}, ...): name one that does")
        for file in (CONFIG, TOKENIZER_CONFIG):
            if file in saved:
                saved[file] = _json(without_code(_parsed(saved[file], f"{name}/{file}"), refuse=False))
        self.used |= {_TOKENIZER + file: content for file, content in saved.items()}
        return saved

    def image_processor(self, name: str) -> dict[str, Any] | None:
        """The steps of the model's image processor, by transformers' keys; None where none was saved with it."""
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


def stored_configuration(name: str) -> dict[str, Any]:
    """The configuration of the model called `name` as it lies there, with whatever it names. Raises UserError."""
    content = _read(name, CONFIG)
    if content is None:
        raise UserError(f"{name}: there is no {CONFIG}")
    return _parsed(content, f"{name}/{CONFIG}")


def files_beside(folder: Path) -> dict[str, bytes]:
    """The files of a text model and its tokenizer that lie in an exported folder, named as in `ForeignFiles.used`."""
    contents = {file: _read(str(folder), file) for file in (*_TOKENIZER_FILES, CONFIG)}
    named = {_TOKENIZER + file: content for file, content in contents.items() if content}
    if content := contents[CONFIG]:
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
    # With peft the library would follow an adapter to another model.
    options = {f"_raise_exceptions_for_{problem}": False for problem in ("missing_entries", "connection_errors")}
    if cached_file(name, "adapter_config.json", **options) is not None:
        raise UserError(f"{name} holds an adapter, not a whole model: merge it into its model first")
    folder = Path(name)
    if not os.path.isdir(folder):
        return
    for index in folder.glob("*.index.json"):
        weight_map = _parsed(_limited(index), str(index)).get("weight_map", {})
        files = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        if not all(isinstance(file, str) and file == Path(file).name for file in files):
            raise UserError(f"{index} names files outside its folder")


@contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files."""
    with tempfile.TemporaryDirectory(prefix="vlm-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def _read(name: str, file: str) -> bytes | None:
    """One file of a local folder or of a hub repository; None where it is not there."""
    folder = Path(name)
    if os.path.isdir(folder):
        path = folder / file
        return _limited(path) if path.is_file() else None
    if not is_hub_name(name):
        raise UserError(f"{name}: no such folder")
    try:
        cached = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {reason(error)}") from error
    return None if cached is None else _limited(Path(cached))


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
