"""Compiled blocks: torch.compile of each block that a part repeats, one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo import config as dynamo

from vlm.model.dual_encoder import DualEncoder
from vlm.model.part_blocks import part_blocks

LENGTH_STEP = 16  # tokens: so many lengths of text are one shape
_MOST_SHAPES = 64  # of one kind of block: lengths, with and without a gradient, in training and in evaluation


def compile_blocks(model: DualEncoder, parts: Sequence[str]) -> None:
    """Let the blocks of these towers be compiled at their first call, for good.

    Blocks of one kind share what is compiled, once for each shape: so texts are padded to a multiple of 16 tokens and
    are not grouped by length. Attention is torch's fused operator there. Values differ from those of plain blocks by
    rounding; two runs, or a resumed one, are the same bit for bit.

    Raises EveryRankError for a part that the model does not have, or that repeats no blocks.
    """
    for part in dict.fromkeys(parts):
        for block in part_blocks(model, part, "compile"):
            # Not the module as a whole: an engine's own hooks on it run outside.
            plain: Any = block.forward
            block.forward = torch.compile(plain, dynamic=False)
        if part == "text":
            model.text.groups_texts, model.text.length_step = False, LENGTH_STEP
    if parts:
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_SHAPES)
