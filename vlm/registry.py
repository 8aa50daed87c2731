"""Classes by name: a recipe or an option chooses one, a duplicate raises, a miss names what exists."""

import importlib
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from vlm.errors import UserError, nearest, reason

Kind = TypeVar("Kind", bound=type[Any])


class Registry(Generic[Kind]):
    """The classes of one role ("objective", "evaluator") by name; a user's own are named as `package.module:Class`.

    `base` is the class, or the protocol that can be checked at run time, that all of them derive from or satisfy.
    """

    def __init__(self, role: str, base: type[Any]) -> None:
        self._role = role
        self._base = base
        self._classes: dict[str, Kind] = {}
        self._places: dict[str, str] = {}

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Make a class known under `name`. Raises ValueError when the name is taken."""

        def add(cls: Kind) -> Kind:
            if name in self._classes:
                other = self._classes[name].__qualname__
                raise ValueError(f"the {self._role} {name!r} is registered twice: {other} and {cls.__qualname__}")
            self._classes[name] = cls
            return cls

        return add

    def register_place(self, name: str, place: str) -> None:
        """Make a class known that is imported when `find` is asked for it; `place` is `package.module:Class`."""
        self._places[name] = place

    def names(self) -> list[str]:
        """The names of all classes, imported or not."""
        return [*self._classes, *self._places]

    def all(self) -> dict[str, Kind]:
        """All classes by name that are registered with their class."""
        return dict(self._classes)

    def name_of(self, cls: Kind) -> str:
        """The name by which `find` finds a class."""
        registered = (name for name, known in self._classes.items() if known is cls)
        return next(registered, f"{cls.__module__}:{cls.__qualname__}")

    def find(self, name: str) -> Kind:
        """The class registered under `name`, or a user's own, which is imported.

        Raises:
            UserError: no class is registered under the name, or what it names cannot be imported or is of another kind.
        """
        if name in self._classes:
            return self._classes[name]
        name = self._places.get(name, name)
        if ":" not in name:
            known = nearest(name, self.names())
            raise UserError(f"there is no {self._role} {name!r}; {known}, or name your own as package.module:Class")
        cls = _imported(name, self._role)
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            raise UserError(
                f"{self._role} {name!r} is not a subclass of {self._base.__module__}.{self._base.__qualname__}"
            )
        return cls  # type: ignore[return-value]


def _imported(name: str, role: str) -> Any:
    """The attribute that `module:attribute` names, dotted where it lies within a class (`module:Outer.Inner`).

    The current folder is searched too, after all other places.
    """
    module, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        searched = f"; looked where Python looks and in {folder}" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{role} {name!r}: {reason(error)}{searched}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{role} {name!r}: its module fails: {type(error).__name__}: {reason(error)}") from None
