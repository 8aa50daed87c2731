"""Terms and providers by name: a recipe chooses them, a duplicate raises, a miss names what exists."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vlm.errors import UserError, nearest, reason
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
        found = _imported(name, self._word)
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise UserError(
                f"{self._word} {name!r} is not a subclass of {self._base.__module__}.{self._base.__qualname__}"
            )
        return found  # type: ignore[return-value]


def _imported(name: str, word: str) -> Any:
    """What `module:attribute` names; modules are looked for in the current folder too, after all other places."""
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        looked = f"; looked where Python looks and in {here}" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{word} {name!r}: {reason(error)}{looked}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{word} {name!r}: its module fails: {type(error).__name__}: {reason(error)}") from None


TERMS: Registry[type[Term]] = Registry("objective", Term)
PROVIDERS: Registry[type[Provider]] = Registry("provider", Provider)
