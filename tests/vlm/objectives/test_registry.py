"""Terms are found by name, a user's own by module and class."""

import sys
from types import ModuleType

import pytest

from vlm.errors import UserError
from vlm.objectives.clip import Clip
from vlm.objectives.registry import TERMS


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
