"""The run-time checking of annotated shapes and types that is active under pytest, in spawned ranks too."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook

# An int is a float, as for the static checker. One kind of error, whichever of the two decorators finds it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))
# While a module of ours is imported, the hook gives compiled files another name, those of the libraries that ours
# imports first too: 4,000 modules would be compiled anew in every process, which takes half a minute.
_LIBRARIES = """
    torch torchvision.transforms.v2 torchvision.io open_clip timm transformers accelerate.tracking deepspeed.utils
    sklearn.linear_model sklearn.manifold matplotlib.figure matplotlib.backends.backend_svg
    webdataset polars pyarrow.parquet fsspec aiohttp typer rich.progress jinja2 safetensors.torch
"""


def activate() -> None:
    """Check every annotation of our own code from its next import on."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is imported
    for library in _LIBRARIES.split():
        import_module(library)
    if jaxtyping.jaxtyped is _JAXTYPED:
        setattr(jaxtyping, "jaxtyped", _checked)  # noqa: B010  # by this name the hook calls it
    install_import_hook(["vlm", "data", "eval", "launch"], "tests.runtime_types.check")


_JAXTYPED = jaxtyping.jaxtyped


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator, which takes longer than most functions, where there are shapes; else the check alone."""

    def decorate(defined: Any) -> Any:
        if not inspect.isfunction(defined) or inspect.isgeneratorfunction(defined) or _has_shape(defined):
            return _JAXTYPED(typechecker=typechecker)(defined)
        return check(defined)

    return decorate


def _has_shape(hint: Any) -> bool:
    """Whether somewhere in these annotations is an array's shape, or a name, which may stand for one."""
    if inspect.isfunction(hint):
        return any(map(_has_shape, hint.__annotations__.values()))
    if isinstance(hint, TypeVar):
        return any(map(_has_shape, (hint.__bound__, *hint.__constraints__)))
    if isinstance(hint, list):  # of a callable's arguments
        return any(map(_has_shape, hint))
    if get_origin(hint) is not None:
        return any(map(_has_shape, get_args(hint)))
    return isinstance(hint, str) or (isinstance(hint, type) and issubclass(hint, AbstractArray))
