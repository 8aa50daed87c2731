"""Text files that carry a checksum of themselves: JSON and YAML that people read, and in which no bit flips unseen.

The SHA-256 stands in the last line and is that of the text with zeros in its place. A file without one is of an older
version; whoever edits a sealed file by hand takes its last line out.
"""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError, reason
from vlm.yaml_text import parse_yaml

CHECKSUM = "checksum"
_BLANK = "0" * 64
# What is left of a last line that had a checksum: most of the digits.
_TRACE = re.compile(rb"(?:\A|\n)[^\n]*[0-9a-f]{32}[^\n]*\n?(?:\}\n?)?\Z")
_SEAL = re.compile(rb'checksum"?: "?([0-9a-f]{64})"?\s*}?\s*\Z')


def sealed_json(values: Mapping[str, Any]) -> str:
    """`values` as JSON, with the checksum as their last key."""
    return _sealed(json.dumps({**values, CHECKSUM: _BLANK}, indent=2) + "\n")


def sealed_yaml(text: str) -> str:
    """YAML text with the checksum as a comment below it."""
    return _sealed(f"{text}# {CHECKSUM}: {_BLANK}\n")


def _sealed(text: str) -> str:
    digest = sha256(text.encode()).hexdigest()
    before, _, after = text.rpartition(_BLANK)
    return f"{before}{digest}{after}"


def is_sealed(path: Path) -> bool:
    """Whether a file carries a checksum of itself."""
    return _seal(path.read_bytes()) is not None


def _seal(content: bytes) -> re.Match[bytes] | None:
    return _SEAL.search(content, max(0, len(content) - 2 * len(_BLANK)))


def _fits(content: bytes, seal: re.Match[bytes] | None) -> bool:
    if seal is None:
        return _TRACE.search(content, max(0, len(content) - 4 * len(_BLANK))) is None
    blank = content[: seal.start(1)] + _BLANK.encode() + content[seal.end(1) :]
    return sha256(blank).hexdigest().encode() == seal[1]


def read_sealed(path: Path) -> str:
    """The text of a file. Raises UserError when it cannot be read, or no longer fits the checksum that it carries."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    seal = _seal(content)
    if not _fits(content, seal):
        edited = "; after an edit of your own, take that line out" if path.suffix == ".yaml" else ""
        raise UserError(
            f"{path} is damaged, or was edited: it does not fit the checksum in its last line (put a copy back{edited})"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no UTF-8 text") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, its checksum tested and left out. Raises UserError for anything else."""
    text = read_sealed(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    values.pop(CHECKSUM, None)
    return values


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its checksum tested. Raises UserError for anything else."""
    text = read_sealed(path)
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values
