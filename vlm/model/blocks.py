"""The repeated blocks of a network in order, by which it is locked, sharded or compiled piece by piece."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from open_clip.timm_model import TimmModel
from torch import nn

_LISTS = (nn.Sequential, nn.ModuleList)


def repeated_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """The blocks that a network repeats (layers of a transformer, residual blocks), in the order of its forward.

    A network whose class has a method `blocks` is asked; timm says it by patterns of names; of others it is the class
    of which most members stand in lists of modules. Empty for a network that repeats nothing.
    """
    if callable(getattr(type(network), "blocks", None)):
        named: Any = network.blocks
        return list(named())
    if isinstance(network, TimmModel) and (blocks := _named_by_timm(network.trunk)):
        return blocks
    return most_repeated(network)


def repeated_stacks(network: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """The blocks of a network by stacks, each of which begins at the inputs: one, or what its method `stacks` says."""
    if callable(getattr(type(network), "stacks", None)):
        named: Any = network.stacks
        return list(named())
    return [blocks] if (blocks := repeated_blocks(network)) else []


def _named_by_timm(network: Any) -> list[nn.Module]:
    """The modules that timm's finest groups of parameters stand for; empty where a model has no such groups."""
    try:
        groups = network.group_matcher(coarse=False).values()
    except (AttributeError, AssertionError, NotImplementedError):
        return []
    pairs = [pair for group in groups for pair in ([(group, None)] if isinstance(group, str) else group)]
    # A pattern with a place is of what goes along with a block; one without numbers is of what comes once.
    patterns = [re.compile(pattern) for pattern, place in pairs if place is None]
    numbered = [pattern for pattern in patterns if pattern.groups]
    return [module for name, module in network.named_modules() if any(one.fullmatch(name) for one in numbered)]


def most_repeated(network: nn.Module) -> list[nn.Module]:
    """The modules, in order, of the class of which most members stand in lists of modules within `network`."""
    listed = [child for module in network.modules() if isinstance(module, _LISTS) for child in module]
    listed = [child for child in listed if not isinstance(child, _LISTS) and any(True for _ in child.children())]
    kinds = Counter(type(child) for child in listed).most_common(1)
    return [child for child in listed if type(child) is kinds[0][0]] if kinds else []
