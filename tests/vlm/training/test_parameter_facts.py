"""What optimizers know of a model's parameters: which decay, at which factor of the rate, which are hidden matrices."""

import pytest
import torch
from torch import nn

from tests.vlm.model.own_towers import Bag
from tests.vlm.model.tiny import tiny_model
from vlm.errors import EveryRankError
from vlm.training.optimizers.adafactor import Adafactor
from vlm.training.optimizers.adamw import AdamW
from vlm.training.optimizers.adamw_8bit import AdamW8bit
from vlm.training.optimizers.maker import moment_bytes, optimizer_maker
from vlm.training.optimizers.muon import Muon
from vlm.training.optimizers.parameters import hidden_matrices, parameter_facts
from vlm.training.optimizers.rates import LrDecay, LrScale


def test_patterns_name_more_parameters_without_decay() -> None:
    model = tiny_model()
    plain, more = (
        {name for name, one in parameter_facts(model, LrScale(), LrDecay(), patterns).items() if not one.decays}
        for patterns in ((), ("*positional_embedding", "text.token_embedding.weight"))
    )
    positional = {"image.trunk.positional_embedding", "text.positional_embedding"}
    assert more - plain == positional | {"text.token_embedding.weight"}
    assert plain < more


def test_a_pattern_of_no_parameter_is_refused_with_the_nearest() -> None:
    line = (
        r"^optimizer.undecayed: no parameter that trains is called 'text.token_embeding.weight'; nearest: text.token_e"
    )
    with pytest.raises(EveryRankError, match=line):
        parameter_facts(tiny_model(), LrScale(), LrDecay(), ("text.token_embeding.weight",))


def test_factors_of_tower_and_layer_are_multiplied() -> None:
    facts = parameter_facts(tiny_model(), LrScale(image=0.1), LrDecay(image=0.5, text=0.8))
    assert facts["image.trunk.conv1.weight"].lr_factor == pytest.approx(0.1 * 0.5**3)
    assert facts["image.trunk.transformer.resblocks.1.mlp.c_fc.weight"].lr_factor == pytest.approx(0.1 * 0.5)
    assert facts["image.trunk.ln_post.weight"].lr_factor == pytest.approx(0.1)
    assert facts["text.token_embedding.weight"].lr_factor == pytest.approx(0.8**3)
    assert facts["text.text_projection"].lr_factor == 1.0
    assert facts["logit_scale"].lr_factor == 1.0


def test_groups_of_an_optimizer_have_each_rate_and_decay_once() -> None:
    model = tiny_model()
    config = AdamW(lr=0.1, weight_decay=0.3, lr_decay=LrDecay(image=0.5), undecayed=("image.trunk.conv1.weight",))
    groups = optimizer_maker(config, model)(model).param_groups
    found = {(group["lr"], group["weight_decay"]): {id(p) for p in group["params"]} for group in groups}
    assert len(found) == len(groups)
    rates = {0.1, 0.05, 0.025, 0.0125}
    # Before the blocks the two embeddings of class and position: the first has one dimension.
    assert set(found) == {(rate, decay) for rate in rates for decay in (0.0, 0.3)}
    named = dict(model.named_parameters())
    assert found[0.0125, 0.3] == {id(named["image.trunk.positional_embedding"])}
    assert sum(map(len, found.values())) == len(named)


def test_hidden_matrices_are_those_within_blocks() -> None:
    facts = parameter_facts(tiny_model(), LrScale(), LrDecay())
    matrices = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    blocks = [f"{tower}transformer.resblocks.{n}" for tower in ("image.trunk.", "text.") for n in (0, 1)]
    assert {name for name, one in facts.items() if one.hidden} == {
        f"{block}.{matrix}" for block in blocks for matrix in matrices
    }


class Tables(Bag):
    """A tower whose block has a matrix, and beside it tables that map no hidden states."""

    def __init__(self) -> None:
        super().__init__(10, 4, 0, 8)
        block = nn.Module()
        block.positions = nn.Embedding(6, 8)
        block.relative_position_bias_table = nn.Parameter(torch.zeros(6, 8))
        block.linear = nn.Linear(8, 8)
        self.layers = nn.ModuleList([block])


def test_tables_within_blocks_are_no_hidden_matrices() -> None:
    assert hidden_matrices(nn.ModuleDict({"text": Tables()})) == {"text.layers.0.linear.weight"}


def test_moments_take_the_bytes_that_each_optimizer_keeps() -> None:
    model = tiny_model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    assert moment_bytes(AdamW(), model) == 4 * 2 * total
    hidden = 2 * 2 * 12 * 32**2  # two towers of two blocks of width 32
    assert moment_bytes(Muon(kind="muon"), model) == 4 * (2 * total - hidden)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    by_hand = sum(
        sizes[name] // shape[-1] + sizes[name] // shape[-2] if len(shape) > 1 else sizes[name]
        for name, shape in shapes.items()
    )
    assert moment_bytes(Adafactor(kind="adafactor"), model) == 4 * by_hand
    eight = sum(2 * size + 8 * -(-size // 256) if size >= 4096 else 8 * size for size in sizes.values())
    assert moment_bytes(AdamW8bit(kind="adamw_8bit"), model) == eight
