"""Texts in common rows: each is what it is alone, and little is padding."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.model.text_packing import PackedTexts
from vlm.model.transformers_towers import TransformersTextTower

SIZES: dict[str, Any] = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
BERT = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 24}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 60, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 20, "bos_token_id": 1}
CONFIGURATIONS: dict[str, Any] = {
    "bert": transformers.BertConfig(**BERT, **DROPOUT),
    "roberta": transformers.RobertaConfig(**BERT, **DROPOUT, pad_token_id=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**BERT, **DROPOUT, pad_token_id=1),
    "gpt2": transformers.GPT2Config(**GPT2, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "clip_text_model": transformers.CLIPTextConfig(**BERT, bos_token_id=1, eos_token_id=2, attention_dropout=0.0),
}
CONTEXT, LENGTHS = 20, torch.tensor([5, 9, 3, 2, 7, 12, 1, 2])


def tower_of(kind: str, pool: str) -> TransformersTextTower:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGURATIONS[kind])
    tower = TransformersTextTower(model, pool, CONTEXT, 1, 6).double()
    tower.train()
    return tower


def tokens() -> Tensor:
    return torch.randint(3, 60, (len(LENGTHS), 14), generator=torch.Generator().manual_seed(1))


def outcome(tower: TransformersTextTower, *, packs: bool, ids: Tensor) -> tuple[Tensor, ...]:
    """Embeddings, and the gradient of something that differs for each."""
    tower.groups_texts = packs
    weights = torch.randn(len(ids), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    embeddings = tower(ids, LENGTHS)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    return embeddings, *torch.autograd.grad((embeddings * weights).sum(), trained)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
@pytest.mark.parametrize("pool", ["first", "mean", "end"])
def test_a_packed_text_is_what_it_is_alone_and_so_are_gradients(kind: str, pool: str) -> None:
    tower = tower_of(kind, pool)
    assert tower.packs_texts
    padded, packed = (outcome(tower, packs=packs, ids=tokens()) for packs in (False, True))
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for number, length in enumerate(LENGTHS):
        alone = tower.eval()(tokens()[number : number + 1, :length], LENGTHS[number : number + 1])
        torch.testing.assert_close(packed[0][number], alone[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_token_states_are_told_at_the_length_of_the_batch(kind: str) -> None:
    tower = tower_of(kind, "end")
    tower.emit_tokens()
    tower.groups_texts = False
    padded = tower(tokens(), LENGTHS).tokens
    tower.groups_texts = True
    packed = tower(tokens(), LENGTHS).tokens
    is_token = torch.arange(14) < LENGTHS[:, None]
    torch.testing.assert_close(packed, padded * is_token[..., None], rtol=1e-9, atol=1e-11)


def test_fewer_rows_go_through_the_network_and_in_evaluation_all() -> None:
    tower, rows = tower_of("bert", "mean"), list[tuple[int, ...]]()
    tower.model.embeddings.register_forward_hook(lambda _, __, states: rows.append(tuple(states.shape[:2])))
    tower(tokens(), LENGTHS)
    tower.eval()(tokens(), LENGTHS)
    assert rows == [(4, 12), (8, 14)]  # 41 tokens: 12 | 9 + 3 | 7 + 5 | 2 + 2 + 1


def test_a_model_that_pools_by_itself_or_takes_no_positions_is_padded() -> None:
    assert not tower_of("bert", "pooler").packs_texts
    small = {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    model = transformers.AutoModel.from_config(transformers.DistilBertConfig(**small))
    assert not TransformersTextTower(model, "mean", CONTEXT, 1, 6).packs_texts
    eager = transformers.BertConfig(**BERT, attn_implementation="eager")
    assert not TransformersTextTower(transformers.AutoModel.from_config(eager), "mean", CONTEXT, 1, 6).packs_texts


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_every_token_has_a_place_of_its_own_and_its_rows_are_nearly_full(sizes: list[int]) -> None:
    lengths, longest = torch.tensor(sizes), max(sizes)
    packed = PackedTexts.of(lengths)
    ids = torch.arange(len(sizes) * longest).view(len(sizes), longest)
    rows = packed.ids(ids, -5)
    is_token = torch.arange(longest) < lengths[:, None]
    assert sorted(rows[packed.text >= 0].tolist()) == ids[is_token].tolist()
    assert (rows[packed.text < 0] == -5).all()
    back = packed.texts(rows[:, :, None].double())[:, :, 0]
    assert torch.equal(back, (ids * is_token).double())
    # Any two rows together hold more than one could: else the second's texts would have gone into the first.
    used = sorted((packed.text >= 0).sum(1).tolist())
    assert len(used) < 2 or used[0] + used[1] > longest


def test_a_token_sees_those_of_its_text_and_causally_those_before() -> None:
    packed = PackedTexts.of(torch.tensor([2, 3, 1]))
    assert packed.text.tolist() == [[1, 1, 1], [0, 0, 2]]
    assert packed.position.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert packed.mask(is_causal=False)[1, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert packed.mask(is_causal=True)[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
