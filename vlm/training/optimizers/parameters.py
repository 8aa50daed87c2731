"""Facts on a model's parameters by which an optimizer groups them; taken before an engine shards them."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vlm.errors import EveryRankError, nearest
from vlm.model.captioner import Decoder
from vlm.model.dual_encoder import DualEncoder
from vlm.model.layer_depth import factors_by_depth
from vlm.model.towers import Tower
from vlm.training.optimizers.rates import LrDecay, LrScale

_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter as an optimizer sees it.

    Attributes:
        shape: of the whole parameter.
        decays: whether it has weight decay.
        lr_factor: of the learning rate.
        hidden: whether it is a matrix that maps hidden states within a block of a tower or decoder.
    """

    shape: tuple[int, ...]
    decays: bool = True
    lr_factor: float = 1.0
    hidden: bool = False


def parameter_facts(
    model: nn.Module, lr_scale: LrScale, lr_decay: LrDecay, undecayed: tuple[str, ...] = ()
) -> dict[str, ParameterFacts]:
    """The facts on a whole model's trainable parameters, by name.

    `undecayed` are patterns of names beside `no_weight_decay_names`. With a decay by layers each tower that has one
    embeds one sample, of which nothing remains.

    Raises:
        EveryRankError: a pattern is of no trainable parameter, or a decay is of a tower without known blocks.
    """
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    plain = no_weight_decay_names(model) | _matching(undecayed, trained)
    depth_factors = _depth_factors(model, lr_decay)
    hidden = hidden_matrices(model)
    return {
        name: ParameterFacts(
            shape,
            decays=name not in plain,
            lr_factor=lr_scale.of(name) * depth_factors.get(name, 1.0),
            hidden=name in hidden,
        )
        for name, shape in trained.items()
    }


def no_weight_decay_names(model: nn.Module) -> frozenset[str]:
    """The parameters to keep from weight decay: logit scale and bias, norms, biases, and all others of one dimension.

    Ask before an engine shards the parameters: they lose their shape then.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if is_norm or parameter.ndim < _MATRIX or name.endswith("bias"):
                names.add(name)
    return frozenset(names)


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """The matrices within the blocks of towers and decoder; no tables (of embeddings, of biases by position)."""
    names = set()
    for child_name, child in model.named_children():
        if not isinstance(child, Tower | Decoder):
            continue
        blocks = {id(block) for block in child.blocks()}
        for block_name, block in child.named_modules(prefix=child_name):
            if id(block) in blocks:
                names |= _matrices(block, block_name)
    return frozenset(names)


def _matrices(block: nn.Module, prefix: str) -> set[str]:
    return {
        name
        for module_name, module in block.named_modules(prefix=prefix)
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(module_name, recurse=False)
        if parameter.ndim == _MATRIX and min(parameter.shape) > 1 and "bias" not in name.rpartition(".")[2]
    }


def _matching(patterns: tuple[str, ...], trained: Mapping[str, object]) -> frozenset[str]:
    names = set()
    for pattern in patterns:
        matched = fnmatch.filter(trained, pattern)
        if not matched:
            raise EveryRankError(
                f"optimizer.undecayed: no parameter that trains is called {pattern!r}; {nearest(pattern, trained)}"
            )
        names.update(matched)
    return frozenset(names)


def _depth_factors(model: nn.Module, lr_decay: LrDecay) -> dict[str, float]:
    if lr_decay == LrDecay():
        return {}
    if not isinstance(model, DualEncoder):
        raise TypeError(f"a {type(model).__name__} has no towers")
    image = factors_by_depth(model, "image", lr_decay.image) if lr_decay.image < 1 else {}
    text = factors_by_depth(model, "text", lr_decay.text) if lr_decay.text < 1 else {}
    return image | text
