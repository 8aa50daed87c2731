"""Class names and prompt templates of zero-shot classification, from files, lists and well-known sets."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from data.samples.class_names import read_class_file, read_list_file, strings
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
    """Classes given as a list, a known list's name, or a file: text (one a line), or JSON (a list, or an object of
    `classes` and `templates`).

    Templates come likewise; when they are None the file's own are taken, else "openai-imagenet" for the classes
    "imagenet", else "simple". Files are looked for below `root`, then from the current folder.

    Raises:
        UserError: no such file or set, other content than that, an empty list, a template without a place for the name.
    """
    names, file_templates = _read_classes(classes, root)
    if templates is None:
        templates = file_templates or ("openai-imagenet" if classes == "imagenet" else "simple")
    if isinstance(templates, str):
        where = f"templates {templates}"
        templates = TEMPLATE_SETS.get(templates) or read_list_file(_file(templates, "templates", root), where)
    for template in templates:
        _check_template(template)
    return ClassPrompts(strings(names, "classes"), strings(templates, "templates"))


def _read_classes(classes: str | Sequence[str], root: str | None) -> tuple[Sequence[str], Sequence[str] | None]:
    if not isinstance(classes, str):
        return classes, None
    if classes in CLASS_LISTS:
        return CLASS_LISTS[classes], None
    return read_class_file(_file(classes, "classes", root), f"classes {classes}")


def _file(name: str, what: str, root: str | None) -> Path:
    known = CLASS_LISTS if what == "classes" else TEMPLATE_SETS
    places = [Path(root or ".") / name, Path(name)]
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
        raise UserError(f"{what} {name:.200}: neither a file nor a known set; {nearest(name, known)}")
    return path


def _check_template(template: str) -> None:
    try:
        places = [field[1:] for field in Formatter().parse(template) if field[1] is not None]
    except ValueError:
        places = []
    # Two {} want two names, and {} beside {0} is refused by Python itself.
    names = [name for name, _, _ in places if name != "c"]
    plain = all(name in ("", "0", "c") and not layout and how in (None, *"rsa") for name, layout, how in places)
    if not places or not plain or (len(names) > 1 and "" in names):
        raise UserError(
            f"template {template!r:.200}: the class name goes where {{}} stands, as in 'a photo of a {{}}.'; "
            "where it goes several times, write {c} each time"
        )


def _fill(template: str, name: str) -> str:
    return template.format(name, c=name)
