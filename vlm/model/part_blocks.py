"""The repeated blocks of a dual encoder's parts, as keys of a recipe name them."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from vlm.errors import EveryRankError
from vlm.model.captioner import Decoder
from vlm.model.dual_encoder import DualEncoder
from vlm.model.towers import Tower

Part = Literal["image", "text", "captioner"]


def part_blocks(model: DualEncoder, part: str, key: str) -> Sequence[nn.Module]:
    """The blocks of a part.

    Raises EveryRankError, in a line that begins with the key, for a part that the model does not have, or that repeats
    no blocks.
    """
    owners: dict[str, Tower | Decoder] = {"image": model.image, "text": model.text}
    if model.decoder is not None:
        owners["captioner"] = model.decoder
    if part not in owners:
        known = ", ".join(owners)
        raise EveryRankError(f"{key}: found {part}, and the model has none (model.captioner); choose from: {known}")
    if not (blocks := owners[part].blocks()):
        raise EveryRankError(f"{key}: found {part}, which repeats no blocks; leave it out")
    return blocks
