"""Export a model and prove, with the other system, that it computes the same."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from data.loading.heldout import HeldOutSet
from launch.model_source import load_model
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.exchange import Parity
from vlm.model.export_format import EXPORT_FORMATS
from vlm.paths import new_folder

NUM_CHECKED = 16  # samples on which both systems are compared

# Short, long, cut at any context length, empty, in capitals, with numbers, marks, accents, other scripts and spaces.
_TEXTS = (
    "a dog",
    "",
    "a photo of two small cats asleep on a red blanket, beside an open window",
    "A RED BUS IN FRONT OF St. Paul's Cathedral; 3,000 people waiting -- in the rain!",
    "un café à la crème, 25 °C",
    "собака на пляже",
    "雪山の前に立つ人",
    "  spaces   and\ttabs  ",
    "it's a man's world, isn't it? (a poster)",
    "close-up of the #1 player's e-mail: someone@example.org",
    "<b>bold</b> &amp; escaped",
    "white",
    "an aerial view of a harbour with sailing boats at dusk",
    "0123456789",
    "🐶 on a skateboard",
    "one after another " * 60,
)


def export_model(
    name: str,
    to: str,
    folder: Path,
    data: Sequence[str],
    *,
    before_head: bool = False,
    without_decoder: bool = False,
    trust: bool = False,
) -> Parity:
    """Write the model called `name` to the new folder `folder` in the format `to`, and return how equal it is there.

    `to` is a name in `EXPORT_FORMATS`, or a class of one's own as `package.module:Class`. The parity is measured on the
    first samples of `data`, or else on drawn pictures and a few texts: what the model was trained on is not needed.
    `before_head` leaves out the projection heads, `without_decoder` the captioning decoder; for `trust` see
    `load_model`.
    """
    try:
        export_format = EXPORT_FORMATS.find(to)()
    except UserError as error:
        raise UserError(f"--to: {error}") from None
    folder = new_folder(folder, "export")
    model = load_model(name, trust=trust)
    if before_head:
        model.drop_heads()
    if without_decoder:
        model.drop_decoder()
    if not data:
        return export_format.export(model, folder, drawn_images(NUM_CHECKED, model.image_spec.size), _TEXTS)
    samples = HeldOutSet(data, model.image_spec, limit=NUM_CHECKED, where="--data")
    (batch,) = samples.batches(World(), len(samples))
    if not batch.valid.any():
        raise UserError(samples.without("picture that can be read", "the first samples are looked at"))
    captions = [caption for group in samples.captions for caption in group]
    return export_format.export(model, folder, batch.images[batch.valid], captions or _TEXTS)


def drawn_images(count: int, size: int) -> UInt8[Tensor, "count 3 size size"]:
    """Pictures from smooth patches of colour to noise, and a black and a white one; always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.zeros(1, 3, size, size), torch.full((1, 3, size, size), 255.0)]
    for number in range(count - len(drawn)):
        cells = min(size, 2 << number % 8)
        colours = 255 * torch.rand(1, 3, cells, cells, generator=generator)
        drawn.append(interpolate(colours, (size, size), mode="bilinear"))
    return torch.cat(drawn)[:count].round().to(torch.uint8)
