"""The depth of a tower's parameters: before its blocks, in one of them, or behind all of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm.errors import EveryRankError
from vlm.model.dual_encoder import DualEncoder
from vlm.model.towers import Tower

_TEXT = "a text"


def factors_by_depth(model: DualEncoder, part: Literal["image", "text"], decay: float) -> dict[str, float]:
    """The factor `decay` to the power of how many layers a parameter of a tower is below what follows its blocks.

    By the names of the model; parameters behind the blocks, whose factor is 1, are left out. The last block has
    `decay`; what stands between two blocks goes with the second. What is before a block is what its input depends on,
    by the graph of one sample: this holds for any network, however it names its parts. Networks side by side are
    counted each by itself.

    Raises:
        EveryRankError: the tower repeats no blocks, or its forward does not call the first of them.
    """
    tower: Tower = getattr(model, part)
    if not (stacks := tower.stacks()):
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise EveryRankError(
            f"optimizer.lr_decay.{part}: found {decay}; the {part} tower ({kind}) repeats no blocks by which to decay; "
            f"lr_scale.{part} is for all of it"
        )
    inputs = _inputs_of(model, part, [block for stack in stacks for block in stack])
    layers: dict[int, int] = {}  # below what follows the blocks, by the identity of a parameter
    for stack in stacks:
        if stack[0] not in inputs:
            raise EveryRankError(
                f"optimizer.lr_decay.{part}: found {decay}; the forward of the {part} tower does not call its first "
                f"block ({type(stack[0]).__name__}), so that nothing tells what is before the blocks"
            )
        layers |= _layers_of(stack, inputs)
    return {
        name: decay ** layers[id(parameter)]
        for name, parameter in tower.named_parameters(part)
        if id(parameter) in layers
    }


def _layers_of(stack: Sequence[nn.Module], inputs: Mapping[nn.Module, Sequence[Tensor]]) -> dict[int, int]:
    layers: dict[int, int] = {}
    seen: set[Any] = set()
    for place, block in enumerate(stack):
        layer = len(stack) - place
        before = _leaves(inputs.get(block, ()), seen)
        layers = {id(leaf): layer if place else layer + 1 for leaf in before} | layers
        layers |= {id(parameter): layer for parameter in block.parameters()}
    return layers


def _inputs_of(
    model: DualEncoder, part: Literal["image", "text"], blocks: Sequence[nn.Module]
) -> dict[nn.Module, list[Tensor]]:
    """The tensors that reach each of these blocks when the tower embeds one sample, as in evaluation."""
    tower: Tower = getattr(model, part)
    found: dict[nn.Module, list[Tensor]] = {}

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(block, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    was_training, device = tower.training, next(tower.parameters()).device
    try:
        tower.eval()
        with torch.enable_grad():
            if part == "image":
                size = model.image_spec.size
                tower(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
            else:
                texts = model.tokenizer([_TEXT])
                tower(texts.tokens.to(device), texts.lengths.to(device))
    finally:
        tower.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _leaves(tensors: Iterable[Tensor], seen: set[Any]) -> list[Tensor]:
    """The leaves that tensors were computed from, without going again where the graph was `seen`."""
    given = list(tensors)
    leaves = [tensor for tensor in given if tensor.grad_fn is None and tensor.requires_grad]
    nodes: list[Any] = [tensor.grad_fn for tensor in given if tensor.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves
