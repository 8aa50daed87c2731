"""The fields of open_clip's tower configurations, and the numbers among them that make a tower."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from open_clip.model import CLIPTextCfg
from pydantic import TypeAdapter, ValidationError

from vlm.errors import nearest

# Least and greatest of what a tower can be made with; the last column says whether the least is left out.
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "layers": (1, 1024, False),
    "width": (1, 65536, False),
    "head_width": (1, 65536, False),
    "heads": (1, 1024, False),
    "mlp_ratio": (0, 64, True),
    "patch_size": (1, 4096, False),
    "image_size": (8, 4096, False),
    "context_length": (2, 65536, False),
    "vocab_size": (3, 2**24, False),
    "pad_id": (-1, 2**24, False),
    "eos_id": (-1, 2**24, False),
    "ls_init_value": (0, 10, True),
    "patch_dropout": (0, 0.99, False),
    "attn_pooler_queries": (1, 65536, False),
    "attn_pooler_heads": (1, 1024, False),
    "timm_drop": (0, 0.99, False),
    "timm_drop_path": (0, 0.99, False),
}

CORRECT_CLS_MASK = "correct_cls_mask"
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# Those of open_clip's tokenizers that name no code, file or address.
_TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")


def checked_fields(fields: dict[str, Any], owner: type) -> dict[str, Any]:
    """The fields, if open_clip's dataclass `owner` has them all, of these types, and a tower can be made of them.

    Raises ValueError in words that begin with the field.
    """
    known = owner.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{name}: unknown key (value {value!r:.60}); {nearest(name, known)}")
    # None stands for open_clip's own default in its JSON files.
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        _validator(owner).validate_python(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{problem['loc'][0]}: found {problem['input']!r:.60}; {problem['msg']}") from None
    for name, value in given.items():
        if name in _BOUNDS:
            _require_within(name, value)
    _require_whole_patches(given)
    _require_data(given)
    return fields


def checked_text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The same of `CLIPTextCfg`, beside which `correct_cls_mask` is known: its builder does not pass that one on."""
    mask = fields.get(CORRECT_CLS_MASK)
    if mask is not None and not isinstance(mask, bool):
        raise ValueError(f"{CORRECT_CLS_MASK}: found {mask!r:.60}; it is true or false")
    checked_fields({name: value for name, value in fields.items() if name != CORRECT_CLS_MASK}, CLIPTextCfg)
    return fields


def open_clip_name(name: str) -> str:
    """open_clip's own spelling of a model's name (its command line also takes slashes)."""
    return name.replace("/", "-")


@cache
def _validator(owner: type) -> Any:
    return TypeAdapter(owner)


def _require_within(name: str, value: Any) -> None:
    least, most, above = _BOUNDS[name]
    for number in value if isinstance(value, list | tuple) else [value]:
        # pydantic takes "12", and true for 1; open_clip would compute with them
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{name}: found {value!r:.60}; it is a number")  # noqa: TRY004 - pydantic wants this one
        if not (least < number if above else least <= number) or number > most:
            wanted = f"above {least:g}" if above else f"from {least:g}"
            raise ValueError(f"{name}: found {value!r:.60}; it is a number {wanted} to {most:g}")


def _require_data(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for what would make a library read files that the field names, or run what is in them."""
    name = fields.get("timm_model_name")
    if name is not None and not _TIMM_NAME.fullmatch(name):
        raise ValueError(
            f"timm_model_name: {name!r:.60} is no name of timm's own; folders and addresses are not followed"
        )
    for option in fields.get("tokenizer_kwargs", {}):
        if option not in _TOKENIZER_OPTIONS:
            raise ValueError(
                f"tokenizer_kwargs: {option!r:.60} is not taken from a file; {nearest(str(option), _TOKENIZER_OPTIONS)}"
            )


def _require_whole_patches(fields: Mapping[str, Any]) -> None:
    if "timm_model_name" in fields or not isinstance(fields.get("layers", 12), int):
        return  # towers without patches
    size, patch = fields.get("image_size"), fields.get("patch_size")
    least = min(size) if isinstance(size, list | tuple) else size
    if patch is not None and least is not None and patch > least:
        raise ValueError(f"patch_size: found {patch}; images of image_size {size} hold no such patch")
