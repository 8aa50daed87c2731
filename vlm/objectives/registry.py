"""Terms and providers by name: a recipe chooses them, a duplicate raises, a miss names what exists."""

import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vlm.errors import UserError, nearest
from vlm.objectives.term import Provider, Term

Kind = TypeVar("Kind", bound=type[Any])


class Registry(Generic[Kind]):
    """The classes of one kind that recipes know by name; others are named as `package.module:Class`."""

    def __init__(self, word: str, base: type[Any]) -> None:
        self._word = word
        self._base = base
        self._classes: dict[str, Kind] = {}

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Make a class known to recipes under `name`. Raises ValueError when the name is taken."""

        def add(found: Kind) -> Kind:
            if name in self._classes:
                other = self._classes[name].__qualname__
                raise ValueError(f"the {self._word} {name!r} is registered twice: {other} and {found.__qualname__}")
            self._classes[name] = found
            return found

        return add

    def all(self) -> dict[str, Kind]:
        """All registered classes by name."""
        return dict(self._classes)

    def find(self, name: str) -> Kind:
        """The class registered under `name`, or a user's own, named as `package.module:Class`."""
        if name in self._classes:
            return self._classes[name]
        if ":" not in name:
            known = nearest(name, self._classes)
            raise UserError(f"there is no {self._word} {name!r}; {known}, or name your own as package.module:Class")
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self._word} {name!r}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise UserError(
                f"{self._word} {name!r} is not a subclass of {self._base.__module__}.{self._base.__qualname__}"
            )
        return found  # type: ignore[return-value]


TERMS: Registry[type[Term]] = Registry("objective", Term)
PROVIDERS: Registry[type[Provider]] = Registry("provider", Provider)
