"""Engines by name: whole weights on every rank, or one of the ways of sharding them."""

from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from vlm.registry import Registry
from vlm.training.engines.base import Engine

ENGINES: Registry[type[Engine]] = Registry("engine", Engine)
# Imported when it is asked for: a run of one engine does not load the libraries of another.
for _name, _class in {
    "ddp": "ddp:DdpEngine",
    "fsdp": "fsdp:FsdpEngine",
    "zero1": "zero:Zero1Engine",
    "zero2": "zero:Zero2Engine",
    "zero3": "zero:Zero3Engine",
}.items():
    ENGINES.register_place(_name, f"vlm.training.engines.{_class}")


def _known(name: str) -> str:
    if name not in ENGINES.names():
        ENGINES.find(name)
    return name


EngineName = Annotated[
    str,
    AfterValidator(_known),
    WithJsonSchema({"anyOf": [{"enum": ENGINES.names()}, {"type": "string", "pattern": ":"}]}),
]
