"""Under pytest every annotated shape and type of our own code is checked at run time."""

from tests.runtime_types import activate

activate()
