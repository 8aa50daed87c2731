"""Terms by name: a recipe chooses them, a duplicate raises, a miss names what exists."""

import importlib
from collections.abc import Callable

from vlm.errors import UserError, nearest
from vlm.objectives.term import Term

_TERMS: dict[str, type[Term]] = {}


def register(name: str) -> Callable[[type[Term]], type[Term]]:
    """Make a term known to recipes under `name`. Raises ValueError when the name is taken."""

    def add(term: type[Term]) -> type[Term]:
        if name in _TERMS:
            raise ValueError(
                f"the objective {name!r} is registered twice: {_TERMS[name].__qualname__} and {term.__qualname__}"
            )
        _TERMS[name] = term
        return term

    return add


def registered() -> dict[str, type[Term]]:
    """All registered terms by name."""
    return dict(_TERMS)


def find_term(name: str) -> type[Term]:
    """The term registered under `name`, or a user's own class named as `package.module:Class`."""
    if name in _TERMS:
        return _TERMS[name]
    if ":" not in name:
        raise UserError(
            f"there is no objective {name!r}; {nearest(name, _TERMS)}, or name your own as package.module:Class"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise UserError(f"objective {name!r} is not a subclass of vlm.objectives.term.Term")
    return found
