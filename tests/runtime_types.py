"""The run-time checking of annotated shapes and types that is active under pytest, in spawned ranks too."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for the static checker


def activate() -> None:
    """Check every annotation of our own code from its next import on."""
    install_import_hook(["vlm", "data", "eval", "launch"], "tests.runtime_types.check")
