"""Activation checkpointing: blocks that keep their input alone, and are computed again in the backward."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vlm.model.dual_encoder import DualEncoder
from vlm.model.part_blocks import part_blocks


def checkpoint_activations(model: DualEncoder, parts: Sequence[str]) -> None:
    """Let the blocks of these parts keep their input alone, for good (Chen et al., 2016).

    Gradients are the same bit for bit: a block is computed again under the random numbers and the precision that it
    had. What is computed without a gradient (the first pass of accumulation, evaluations, captions) stays as it was.
    What a block computes behind the last tensor that the backward wants, its last product as a rule, is left out then.

    Raises EveryRankError for a part that the model does not have, or that repeats no blocks.
    """
    for part in dict.fromkeys(parts):
        for block in part_blocks(model, part, "activation_checkpointing"):
            # Not the module as a whole: an engine's own hooks on it run once.
            block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
