"""The run-time checking of annotated shapes and types that is active under pytest, in spawned ranks too."""

import os
from importlib import import_module

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for the static checker
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
    install_import_hook(["vlm", "data", "eval", "launch"], "tests.runtime_types.check")
