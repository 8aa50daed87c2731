"""Class names and prompt templates of zero-shot classification, from files, lists and well-known sets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from vlm.errors import UserError, nearest

CLASS_LISTS: dict[str, tuple[str, ...]] = {"imagenet": tuple(IMAGENET_CLASSNAMES)}
# open_clip's templates are functions; of "{}" they make the format string.
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "openai-imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES),
}


@dataclass(frozen=True)
class ClassPrompts:
    """The classes, by label, and the templates that make a prompt of each."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self) -> list[str]:
        """Every class in every template, class by class."""
        return [_fill(template, name) for name in self.names for template in self.templates]


def load_class_prompts(
    classes: str | Sequence[str], templates: str | Sequence[str] | None, root: str | None
) -> ClassPrompts:
    """Classes given as a list, a known list's name, or a JSON file: a list, or an object of `classes` and `templates`.

    Templates come likewise; when they are None the file's own are taken, else "openai-imagenet" for the classes
    "imagenet", else "simple". Files are looked for below `root`, then from the current folder.

    Raises:
        UserError: no such file or set, other content than that, an empty list, a template without a place for the name.
    """
    names, own_templates = _read_classes(classes, root)
    if templates is None:
        templates = own_templates or ("openai-imagenet" if classes == "imagenet" else "simple")
    if isinstance(templates, str):
        where = f"templates {templates}"
        templates = TEMPLATE_SETS.get(templates) or _strings(_read_json(templates, "templates", root), where)
    for template in templates:
        _check_template(template)
    return ClassPrompts(_strings(names, "classes"), _strings(templates, "templates"))


def _read_classes(classes: str | Sequence[str], root: str | None) -> tuple[Sequence[str], Sequence[str] | None]:
    if not isinstance(classes, str):
        return classes, None
    if classes in CLASS_LISTS:
        return CLASS_LISTS[classes], None
    stored = _read_json(classes, "classes", root)
    if not isinstance(stored, dict):
        return _strings(stored, f"classes {classes}"), None
    unknown = sorted(stored.keys() - {"classes", "templates"})
    if unknown:
        raise UserError(f"classes {classes}: unknown key {unknown[0]}; {nearest(unknown[0], ['classes', 'templates'])}")
    names = _strings(stored.get("classes"), f"classes {classes}: classes")
    templates = stored.get("templates")
    return names, None if templates is None else _strings(templates, f"classes {classes}: templates")


def _read_json(name: str, what: str, root: str | None) -> Any:
    known = CLASS_LISTS if what == "classes" else TEMPLATE_SETS
    places = [Path(root or ".") / name, Path(name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"{what} {name}: neither a file nor a known set; {nearest(name, known)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path}: not readable as JSON: {error}") from None


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) and item for item in value):
        raise UserError(f"{where}: expected a list of strings, at least one and none empty, found {_shown(value)}")
    return tuple(value)


def _check_template(template: str) -> None:
    try:
        has_place = _fill(template, "cat") != _fill(template, "dog")
    except (IndexError, KeyError, ValueError, AttributeError):
        has_place = False
    if not has_place:
        raise UserError(f"template {template!r}: the class name goes where {{}} stands, as in 'a photo of a {{}}.'")


def _fill(template: str, name: str) -> str:
    return template.format(name, c=name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
