"""Class names and templates from lists, files and known sets; what is wrong with them is told in one line."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from eval.classes import TEMPLATE_SETS, load_class_prompts
from vlm.errors import UserError


def stored(folder: Path, content: Any, name: str = "classes.json") -> str:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def test_every_class_comes_in_every_template(tmp_path: Path) -> None:
    prompts = load_class_prompts(["cat", "dog"], ["a {}.", "two {c}s"], None).prompts()
    assert prompts == ["a cat.", "two cats", "a dog.", "two dogs"]


def test_the_known_sets_are_those_of_open_clip() -> None:
    classes = load_class_prompts("imagenet", None, None)
    assert classes.names == tuple(open_clip.IMAGENET_CLASSNAMES)
    expected = [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert classes.prompts()[: len(expected)] == ["tench".join(t.split("{}")) for t in classes.templates]
    assert load_class_prompts(["tench"], "openai-imagenet", None).prompts() == expected
    simple = [template("tench") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert load_class_prompts(["tench"], None, None).prompts() == simple


def test_files_below_the_root_hold_classes_and_templates(tmp_path: Path) -> None:
    listed = stored(tmp_path, ["cat", "dog"], "list.json")
    both = stored(tmp_path, {"classes": ["cat", "dog"], "templates": ["my {}"]}, "both.json")
    templates = stored(tmp_path, ["their {}"], "templates.json")
    assert load_class_prompts(listed, None, str(tmp_path)).templates == TEMPLATE_SETS["simple"]
    assert load_class_prompts(both, None, str(tmp_path)).prompts() == ["my cat", "my dog"]
    assert load_class_prompts(both, templates, str(tmp_path)).prompts() == ["their cat", "their dog"]
    assert load_class_prompts(str(tmp_path / listed), ["a {}"], None).prompts() == ["a cat", "a dog"]


def test_text_files_and_files_that_begin_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("\ufeffcat\r\nsea lion \r\n\r\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("a {}.\nthe {c}\n", encoding="utf-8")
    (tmp_path / "classes.json").write_text('\ufeff["cat", "half \\ud83d"]', encoding="utf-8")
    prompts = load_class_prompts("classnames.txt", "templates.txt", str(tmp_path)).prompts()
    assert prompts == ["a cat.", "the cat", "a sea lion.", "the sea lion"]
    assert load_class_prompts("classes.json", None, str(tmp_path)).names == ("cat", "half \ufffd")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken", r"^classes .*classes\.json: not readable as JSON"),
        ([], r"^classes classes\.json: expected a list of strings.*found \[\]"),
        (["cat", 3], r"^classes classes\.json: expected a list of strings"),
        ({"clases": ["cat"]}, r"unknown key clases; nearest: classes"),
        ({"templates": ["a {}"]}, r"^classes classes\.json: classes: expected a list of strings.*found None"),
        ({"classes": ["cat"], "templates": "a {}"}, r"^classes classes\.json: templates: expected a list"),
        ({"classes": ["cat"], "templates": ["a photo"]}, r"^template 'a photo': the class name goes where \{\} stands"),
        ({"classes": ["cat"], "templates": ["a {name}"]}, r"^template 'a \{name\}': the class name goes"),
        ({"classes": ["cat"], "templates": ["a {"]}, r"^template 'a \{': the class name goes"),
        ({"classes": ["cat"], "templates": ["{:>999999999}"]}, r"^template '\{:>999999999\}': the class name goes"),
        ({"classes": ["cat"], "templates": ["{0.__class__}"]}, r"^template .*: the class name goes"),
        ("[" * 100_000, r"not readable as JSON"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_class_prompts(stored(tmp_path, content), None, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_set_names_what_exists() -> None:
    with pytest.raises(UserError, match=r"^classes imagnet: neither a file nor a known set; nearest: imagenet"):
        load_class_prompts("imagnet", None, None)
    with pytest.raises(UserError, match=r"^templates openai: neither a file nor a known set; nearest: openai-imagenet"):
        load_class_prompts("imagenet", "openai", None)


@pytest.mark.parametrize("template", ["a {} and {}", "{} {0}", "a {!x}", "{", "{c.__class__}", "{:>9}", "none"])
def test_a_template_that_python_could_not_fill_is_told(template: str) -> None:
    with pytest.raises(UserError, match=r"^template .*the class name goes where \{\} stands"):
        load_class_prompts(["cat"], [template], None)
    assert load_class_prompts(["cat"], ["{c} and {c}", "{0} or {0}"], None).prompts() == ["cat and cat", "cat or cat"]


@pytest.mark.parametrize("what", ["classes", "templates"])
def test_a_list_in_place_of_a_file_is_told(what: str) -> None:
    given = {"classes": ["cat"], "templates": None, what: ",".join(["cat"] * 200)}
    with pytest.raises(UserError, match=rf"^{what} cat,cat.*neither a file nor a known set") as caught:
        load_class_prompts(given["classes"], given["templates"], None)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
