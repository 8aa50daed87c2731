"""The one place where image files are opened: each is decoded to its end, once, or its sample is bad."""

import io
from functools import cached_property

import numpy as np
from PIL import Image

from data.images import jpeg
from data.images.jpeg import Reduction
from data.images.pillow import MAX_PIXELS, Pixels, foreign_bytes, grey, orientation_of, rgb
from data.samples.bad_sample import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several JPEG files in a row, of which the first is the picture


class Picture:
    """A stored image: what its header says, and its pixels, which are had whole or not at all.

    Training, evaluation, `data check`, `data build` and the filter open images here and nowhere else, so that a file is
    good for all of them or for none. What Pillow refuses is refused; so is a JPEG whose data end too early or
    contradict themselves, which Pillow would fill up with grey.

    `width` and `height` are pixels of the full image as stored, `orientation` is its EXIF orientation (1 to 8),
    `format` and `mode` are Pillow's names. `reducible` says whether it can be decoded at a fraction of its size.

    Raises:
        BadSampleError: it is empty, of no such format, damaged, or has more than `max_pixels`. Damage within a JPEG's
            data is found by whatever asks for its pixels.
    """

    def __init__(self, stored: bytes, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> None:
        if not stored:
            raise BadSampleError("its image is empty (0 bytes)")
        self._stored = stored
        self._formats = formats
        self._fast = jpeg.read_header(stored)
        if self._fast is not None:
            self.width, self.height, self.orientation, self.mode = self._fast
            self.format, self.reducible = "JPEG", True
            _check_pixels(self.width, self.height, max_pixels)
            return
        image = self.pillow_image
        _check_pixels(image.width, image.height, max_pixels)
        self.format, self.mode = image.format or "", image.mode
        self.reducible = self.format in _JPEG_FORMATS
        if not self.reducible:
            with foreign_bytes():
                image.load()  # before anything is asked of its metadata, which may lie behind the pixels
        self.width, self.height = image.size
        self.orientation = orientation_of(image)

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as it is to be seen."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    @cached_property
    def pillow_image(self) -> Image.Image:
        """Pillow's image; of a JPEG its header only is read.

        Raises:
            BadSampleError: it is of no such format, or its header is damaged.
        """
        with foreign_bytes():
            return Image.open(io.BytesIO(self._stored), formats=self._formats)

    def rgb(self, reduction: Reduction = 1) -> Pixels:
        """The pixels in 8-bit RGB, [height, width, 3], at 1 / `reduction` of its size (rounded up) if it is reducible.

        Raises:
            BadSampleError: it is not whole.
        """
        if self._fast is not None:
            pixels = jpeg.decode(self._stored, self._fast, reduction)
            if pixels is not None:
                return pixels
        image = self.image(reduction)
        with foreign_bytes():
            return np.array(rgb(image))  # a copy: torch wants to own what it reads

    def grey(self, reduction: Reduction = 1) -> Image.Image:
        """The image in 8 bits of grey, at 1 / `reduction` of its size if it is reducible.

        Raises:
            BadSampleError: it is not whole.
        """
        if self._fast is not None:
            pixels = jpeg.decode(self._stored, self._fast, reduction, "GRAY")
            if pixels is not None:
                return Image.fromarray(pixels[:, :, 0])
        image = self.image(reduction, "L")
        with foreign_bytes():
            return grey(image)

    def image(self, reduction: Reduction = 1, mode: str | None = None) -> Image.Image:
        """The image in its own colours with its metadata, decoded by Pillow; a reducible one by 1 / `reduction`.

        A JPEG can be had in another `mode` at no cost ("L" of RGB).

        Raises:
            BadSampleError: it is not whole.
        """
        image = self.pillow_image
        if self.reducible:
            jpeg.refuse_damaged(self._stored)
            with foreign_bytes():
                image.draft(mode, (self.width // reduction, self.height // reduction))
                image.load()
        return image

    def check(self) -> None:
        """Decode it as cheaply as its format allows.

        Raises:
            BadSampleError: it is not whole.
        """
        if self.reducible:
            self.grey(8)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image by what its header says, before memory is spent on it."""
    if width * height > max_pixels:
        raise BadSampleError(f"its image has {width} x {height} pixels, more than {max_pixels:,}")
