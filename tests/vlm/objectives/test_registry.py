"""Terms are found by name, a user's own by module and class."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from vlm.errors import UserError
from vlm.objectives.recipe import Terms
from vlm.objectives.registry import TERMS
from vlm.objectives.terms.clip import Clip


def test_a_duplicate_name_raises() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        TERMS.register("clip")(Clip)


def test_a_miss_names_what_exists() -> None:
    with pytest.raises(UserError, match="there is no objective 'clipp'; nearest: clip"):
        TERMS.find("clipp")


def test_a_users_own_class_needs_no_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_terms")
    module.Mine = type("Mine", (Clip,), {})  # type: ignore[attr-defined]
    module.other = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_terms", module)
    assert issubclass(TERMS.find("my_terms:Mine"), Clip)
    with pytest.raises(UserError, match="not a subclass"):
        TERMS.find("my_terms:other")
    with pytest.raises(UserError, match="my_missing_terms"):
        TERMS.find("my_missing_terms:Mine")


@pytest.mark.parametrize(("name", "cross"), [("gap-cua", 0.0), ("gap-cuaxu", 1.0)])
def test_a_preset_is_a_sum_by_one_name(name: str, cross: float) -> None:
    terms = TypeAdapter(Terms).validate_python(name)
    assert {term: options.weight for term, options in terms.items()} == {"clip": 1, "uniformity": 1, "alignment": 1}
    uniformity = terms["uniformity"].model_dump()
    assert (uniformity["image"], uniformity["text"], uniformity["cross"]) == (0.5, 0.5, cross)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="no objective preset 'gap-cau'; nearest: gap-cua"):
        TypeAdapter(Terms).validate_python("gap-cau")


def test_a_term_of_ones_own_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_terms.py").write_text(
        "from vlm.objectives.terms.clip import Clip\n\n\nclass Pull(Clip): pass\n"
    )
    (tmp_path / "my_broken_terms.py").write_text("1 / 0\n")
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert TERMS.find("my_own_terms:Pull").__name__ == "Pull"
    assert sys.path[-1] == str(tmp_path)  # after all others: a folder of one's own called data shadows nothing
    with pytest.raises(UserError, match=r"my_missing:Pull.*No module named.*looked where Python looks and in /"):
        TERMS.find("my_missing:Pull")
    with pytest.raises(UserError, match="its module fails: ZeroDivisionError"):
        TERMS.find("my_broken_terms:Pull")
    for name in (":", "a:", ":b", ".a:b", "a..b:c", "os:path"):
        with pytest.raises(UserError):
            TERMS.find(name)


def test_a_kind_may_stand_under_several_names_and_is_written_as_it_was_read() -> None:
    recipe = {"near": {"kind": "clip", "label_smoothing": 0.1}, "clip": 0.5, "far": {"kind": "clip", "weight": 2}}
    adapter = TypeAdapter(Terms)
    terms = adapter.validate_python(recipe)
    assert [type(term) for term in terms.values()] == [Clip] * 3
    assert [term.weight for term in terms.values()] == [1, 0.5, 2]
    again = adapter.validate_python(adapter.dump_python(terms))
    assert again == terms
    assert [(name, type(term)) for name, term in again.items()] == [(name, Clip) for name in recipe]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"near": 1.0}, "there is no objective 'near'"),
        ({"near": {"kind": "clipp"}}, "there is no objective 'clipp'; nearest: clip"),
        ({"near": {"kind": 3}}, "near.kind: found 3; input should be the name of a kind"),
        ({"a/b": {"kind": "clip"}}, "'a/b' is no name"),
        ({"near": {"kind": "clip", "label_smoothin": 1}}, "near.label_smoothin: unknown key"),
    ],
)
def test_a_wrong_name_or_kind_is_one_line(terms: dict[str, Any], words: str) -> None:
    with pytest.raises((ValidationError, UserError), match=words):
        TypeAdapter(Terms).validate_python(terms)
