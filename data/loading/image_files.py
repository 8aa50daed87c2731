"""Image files in a folder, or parts of them, to evaluate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.images.crop import Box
from data.images.pillow import Pixels
from data.images.views import evaluation_view
from data.loading.held_out_images import HeldOutImages
from data.samples.bad_sample import BadSampleError
from data.shards.tar import MOST_BYTES
from vlm.model.image_spec import ImageSpec
from vlm.skip import Skip

_MOST_BYTES = MOST_BYTES["jpg"]


class ImageFile(NamedTuple):
    """A file and, where only a part of the image is meant, its box in pixels of the image as stored."""

    path: Path
    box: Box | None = None


class ImageFiles(HeldOutImages):
    """Numbered image files, as a model of these images sees them."""

    def __init__(self, files: Sequence[ImageFile], image: ImageSpec, source: str) -> None:
        super().__init__(image.size)
        self._files = tuple(files)
        self._image = image
        self._source = source

    def __len__(self) -> int:
        return len(self._files)

    def stored_image(self, number: int) -> bytes:  # noqa: D102
        path = self._files[number].path
        if path.stat().st_size > _MOST_BYTES:
            raise BadSampleError(f"its image has more than {_MOST_BYTES >> 20} MiB")
        return path.read_bytes()

    def view(self, number: int) -> Pixels:  # noqa: D102
        return evaluation_view(self.stored_image(number), self._image, box=self._files[number].box)

    def place_of(self, number: int) -> str:  # noqa: D102
        return str(self._files[number].path)

    def skip(self, number: int, reason: str) -> Skip:  # noqa: D102
        path = self._files[number].path
        return Skip(self._source, str(path.parent), path.name, reason, "")
