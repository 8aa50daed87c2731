"""Models of transformers with their weights, which the library reads without unpickling."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from vlm.errors import UserError
from vlm.model.clean_configuration import quiet
from vlm.model.foreign import require_readable_weights


class TransformersModels:
    """The transformers models that the towers of one dual encoder are made of; one that serves both is loaded once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, bool], Any] = {}

    def load(
        self,
        name: str,
        configuration: PreTrainedConfig,
        *,
        pretrained: bool,
        cls: Any = AutoModel,
        left_out: list[str] | None = None,
    ) -> tuple[Any, set[int]]:
        """The model, and the identities of its parameters of which its files hold nothing; see `load`."""
        if not hasattr(configuration, "text_config"):
            return load(name, configuration, pretrained=pretrained, cls=cls, left_out=left_out)
        key = (name, pretrained)
        if key not in self._models:
            self._models[key] = load(name, configuration, pretrained=pretrained, left_out=left_out)
        return self._models[key]  # type: ignore[no-any-return]

    def scale_and_bias(self) -> dict[str, Tensor]:
        """The learned logit scale and bias of the one pretrained model that both towers are halves of."""
        ((model, _),) = self._models.values()
        values = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
        return {name: value.detach().reshape(1) for name, value in values.items() if value is not None}


def load(
    name: str,
    configuration: PreTrainedConfig,
    *,
    pretrained: bool,
    cls: Any = AutoModel,
    left_out: list[str] | None = None,
    **options: Any,
) -> tuple[Any, set[int]]:
    """A model of the library in fp32, and the identities of its parameters and buffers of which its files hold nothing.

    What they hold beside the model is added to `left_out`, by name.
    """
    with quiet():
        if not pretrained:
            return cls.from_config(configuration, trust_remote_code=False, **options), set()
        require_readable_weights(name)
        model, loading = cls.from_pretrained(
            name,
            config=configuration,
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **options,
        )
    for key, shape, needed_shape in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"{key} is {list(shape)} in its files but {list(needed_shape)} in the model (another image_size?)"
        )
    if left_out is not None:
        left_out += sorted(loading["unexpected_keys"])
    missing = set(loading["missing_keys"])
    named = chain(model.named_parameters(), model.named_buffers())
    return model, {id(tensor) for key, tensor in named if key in missing}


@contextmanager
def file_as_folder(path: Path) -> Iterator[Path]:
    """A temporary folder in which the library looks for weights and comes upon this one file."""
    with tempfile.TemporaryDirectory(prefix="vlm-") as folder:
        name = "model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"
        (Path(folder) / name).symlink_to(path.resolve())
        yield Path(folder)


def require_weights(tower: nn.Module, missing: set[int]) -> None:
    """Raise UserError for a trained parameter of which the files hold nothing: it would be random, silently."""
    for name, parameter in tower.named_parameters():
        if id(parameter) in missing and parameter.requires_grad:
            raise UserError(f"its files hold no weights for {name.removeprefix('model.')}")
