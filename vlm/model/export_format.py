"""Export formats by name: the ways in which other systems keep a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import Parity, export_open_clip
from vlm.registry import Registry


@runtime_checkable
class ExportFormat(Protocol):
    """A format that another system reads; it is made without arguments, and proves that the other computes the same."""

    def export(
        self, model: DualEncoder, folder: Path, images: UInt8[Tensor, "images 3 size size"], captions: Sequence[str]
    ) -> Parity:
        """Write `model` to the new folder `folder` and compare both systems on `images` and `captions`.

        Raises:
            UserError: the format cannot express the model, or the other system computes something else from it; nothing
                is left behind then.
        """


EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry("export format", ExportFormat)


@EXPORT_FORMATS.register("open_clip")
class OpenClipFormat:
    """The folder that open_clip reads as `local-dir:FOLDER`."""

    def export(
        self, model: DualEncoder, folder: Path, images: UInt8[Tensor, "images 3 size size"], captions: Sequence[str]
    ) -> Parity:
        """See `export_open_clip`."""
        return export_open_clip(model, folder, images, captions)
