"""Texts in groups of like length: each embedding and gradient is that of the text alone, without any padding."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vlm.model.tiny import architecture, perturb, tiny_model
from vlm.model import length_groups
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.length_groups import LengthGroups

WIDTH = architecture()["text_cfg"]["width"]
LENGTHS = [2, 9, 3, 16, 9, 5, 2, 12]
TOWERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "end id": {"pool_type": "eos", "eos_id": 49407},
    "class token": {"embed_cls": True, "correct_cls_mask": True},
    "custom block": {"qk_norm": True},
}


@pytest.fixture(autouse=True)
def cheap_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(length_groups._WEIGHTS_PER_GROUP, "cpu", 2 * WIDTH**2)


def texts_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids between start and end, with what must not matter behind them."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 49000, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1] = 49406, 49407
    return tokens, torch.tensor(lengths)


def built(kind: str, **fields: Any) -> DualEncoder:
    model = tiny_model(architecture=architecture(text=TOWERS[kind]), **fields)
    perturb(model)
    return model.double().train()


@pytest.mark.parametrize("kind", TOWERS)
def test_a_text_in_a_group_is_the_text_alone(kind: str) -> None:
    grouped, alone = built(kind), built(kind)
    tokens, lengths = texts_of(LENGTHS)
    target = torch.randn(len(LENGTHS), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embeddings = grouped.encode_text(tokens, lengths)
    (embeddings * target).sum().backward()
    for row, length in enumerate(LENGTHS):
        expected = alone.encode_text(tokens[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(embeddings[row : row + 1], expected, rtol=0, atol=1e-12)
        (expected * target[row]).sum().backward()
    for name, parameter in alone.text.named_parameters():
        torch.testing.assert_close(grouped.text.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["causal", "class token"])
def test_in_fp32_it_is_the_padded_form_within_a_millionth(kind: str) -> None:
    model = built(kind).float()
    tokens, lengths = texts_of(LENGTHS)
    padded = model.eval().encode_text(tokens, lengths)
    torch.testing.assert_close(model.train().encode_text(tokens, lengths), padded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "class token"])
def test_states_of_tokens_are_those_of_the_padded_form(kind: str) -> None:
    model = built(kind, captioner=CaptionerConfig(layers=1, queries=4))
    tokens, lengths = texts_of(LENGTHS)
    embeddings, states = model.encode_text_and_states(tokens, lengths)
    expected = model.eval().encode_text_and_states(tokens, lengths)
    torch.testing.assert_close(embeddings, expected[0], rtol=0, atol=1e-12)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(states[row, :length], expected[1][row, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "own"), [("causal", 0), ("class token", 1)])
def test_most_padding_is_not_computed_in_training_and_an_evaluation_is_padded(kind: str, own: int) -> None:
    model = built(kind)
    tokens, lengths = texts_of(LENGTHS)
    seen: list[int] = []
    (first, *_) = (module for name, module in model.text.named_modules() if name.endswith("resblocks.0.mlp"))
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    model.encode_text(tokens, lengths)
    model.text.groups_texts = False
    model.encode_text(tokens, lengths)
    model.text.groups_texts = True
    model.eval().encode_text(tokens, lengths)
    texts, padded = len(LENGTHS), len(LENGTHS) * (max(LENGTHS) + own)
    assert seen == [LengthGroups.of(lengths, WIDTH).num_tokens + own * texts, padded, padded]
    assert seen[0] < 0.7 * padded


def test_no_module_runs_more_often_for_more_groups() -> None:
    model = built("causal")
    calls = []
    for name, module in model.text.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for lengths in ([7] * 4, [2, 7, 12, 16]):
        calls.clear()
        model.encode_text(*texts_of(lengths))
        assert len(calls) == len(set(calls))
        assert "token_embedding" in calls


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 12))
def test_the_cut_is_the_cheapest_of_all(lengths: list[int], per_group: int) -> None:
    shapes = length_groups._cheapest(np.array(lengths), per_group)
    ordered = sorted(lengths)

    def cost(ends: tuple[int, ...]) -> int:
        starts = (0, *ends[:-1])
        return sum((end - start) * ordered[end - 1] + per_group for start, end in zip(starts, ends, strict=True))

    inner = range(1, len(ordered))
    cuts = [(*ends, len(ordered)) for n in range(len(ordered)) for ends in itertools.combinations(inner, n)]
    ends = tuple(np.cumsum([count for count, _ in shapes]).tolist())
    assert cost(ends) == min(map(cost, cuts))
    assert [length for _, length in shapes] == [ordered[end - 1] for end in ends]


def test_what_is_cut_comes_back_in_order() -> None:
    tokens, lengths = texts_of(LENGTHS)
    groups = LengthGroups.of(lengths, WIDTH)
    assert len(groups.shapes) > 2
    parts = groups.split(groups.flat(tokens))
    assert [tuple(part.shape) for part in parts] == list(groups.shapes)
    back = groups.padded([part.double() for part in parts], 20)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(back[row, :length].long(), tokens[row, :length])
    assert torch.equal(groups.in_order(groups.texts(lengths)), lengths)
    assert groups.num_tokens == sum(count * length for count, length in groups.shapes) < tokens.numel()
