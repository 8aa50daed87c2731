"""The tokenizers that come with the package, by names such as `vlm:scenes`."""

import json
from pathlib import Path

from vlm.errors import UserError, nearest

SHIPPED = "vlm:"
_FOLDER = Path(__file__).parent / "tokenizers"
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}


def shipped_tokenizer(name: str) -> dict[str, bytes]:
    """The files of the tokenizer called `name`, as transformers reads them. Raises UserError for an unknown one."""
    known = {f"{SHIPPED}{path.stem}": path for path in _FOLDER.glob("*.json")}
    if name not in known:
        raise UserError(f"no tokenizer {name} comes with vlm; {nearest(name, known)}")
    return {"tokenizer.json": known[name].read_bytes(), "tokenizer_config.json": json.dumps(_SETTINGS).encode()}
