"""Terms are found by name, a user's own by module and class."""

import sys
from types import ModuleType

import pytest

from vlm.errors import UserError
from vlm.objectives.clip import Clip
from vlm.objectives.registry import find_term, register


def test_a_duplicate_name_raises() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register("clip")(Clip)


def test_a_miss_names_what_exists() -> None:
    with pytest.raises(UserError, match="there is no objective 'clipp'; nearest: clip"):
        find_term("clipp")


def test_a_users_own_class_needs_no_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_terms")
    module.Mine = type("Mine", (Clip,), {})  # type: ignore[attr-defined]
    module.other = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_terms", module)
    assert issubclass(find_term("my_terms:Mine"), Clip)
    with pytest.raises(UserError, match="not a subclass"):
        find_term("my_terms:other")
    with pytest.raises(UserError, match="my_missing_terms"):
        find_term("my_missing_terms:Mine")
