"""One registry for all that recipes and options name: what is not there, is there twice, or is of another kind."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytest

from vlm.errors import UserError
from vlm.registry import Registry


@runtime_checkable
class Shape(Protocol):
    def area(self) -> float: ...


class Square:
    def area(self) -> float:
        return 1.0


@pytest.fixture
def shapes() -> Registry[Any]:
    registry: Registry[Any] = Registry("shape", Shape)
    registry.register("square")(Square)
    return registry


def test_a_duplicate_raises_and_a_miss_names_what_exists(shapes: Registry[Any]) -> None:
    assert shapes.find("square") is Square
    assert shapes.all() == {"square": Square}
    with pytest.raises(ValueError, match="the shape 'square' is registered twice: Square and Square"):
        shapes.register("square")(Square)
    with pytest.raises(
        UserError, match=r"^there is no shape 'sqare'; nearest: square, or name your own as package\.module:Class$"
    ):
        shapes.find("sqare")


def test_a_class_that_satisfies_the_protocol_needs_no_base_and_another_one_is_refused(
    shapes: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_shapes.py").write_text(
        "class Circle:\n    def area(self) -> float:\n        return 3.0\n\n\nclass Colour:\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert shapes.find("my_shapes:Circle")().area() == 3.0
    for name in ("my_shapes:Colour", "os:path"):
        with pytest.raises(UserError, match=r"is not a subclass of .*\.Shape$"):
            shapes.find(name)


def test_a_class_within_another_is_found_by_the_name_that_it_is_given(
    shapes: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nested_shapes.py").write_text(
        "class Box:\n    class Lid:\n        def area(self) -> float:\n            return 2.0\n"
    )
    monkeypatch.chdir(tmp_path)
    lid = shapes.find("nested_shapes:Box.Lid")
    assert lid().area() == 2.0
    assert shapes.name_of(lid) == "nested_shapes:Box.Lid"
    with pytest.raises(UserError, match=r"^shape 'nested_shapes:Box\.Bottom': .*has no attribute 'Bottom'"):
        shapes.find("nested_shapes:Box.Bottom")
