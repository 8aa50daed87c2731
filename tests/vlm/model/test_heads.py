"""Projection heads: closed forms, what they learn, several at once, and reading before them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.vlm.model.tiny import TEXTS, some_images, tiny_model
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import export_open_clip
from vlm.model.heads import HeadConfig, SeveralHeads, build_head
from vlm.tensor_file import save_tensors
from vlm.training.optimizers.parameters import no_weight_decay_names

MLP = {"kind": "mlp", "hidden": 40, "dim": 10}


def both(**fields: Any) -> dict[str, Any]:
    return {"image_head": fields, "text_head": fields}


def embeddings(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return model.encode_image(some_images(4)), model.encode_text(*model.tokenizer(TEXTS))


def test_a_kappa_of_one_is_no_head_and_reweighting_learns_nothing() -> None:
    plain, headed = tiny_model(), tiny_model(**both(kind="reweight", kappa=1.0))
    assert [name for name, _ in headed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for rows, expected in zip(embeddings(headed), embeddings(plain), strict=True):
        assert torch.equal(rows, expected)


def test_reweighting_lets_later_coordinates_have_less_of_the_gradient() -> None:
    rows = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    build_head(HeadConfig(kind="reweight", kappa=1.3), 24).double()(rows).sum().backward()
    assert rows.grad is not None
    expected = torch.tensor([1.3**-i for i in range(24)], dtype=torch.float64).expand(5, 24)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fields", "width"),
    [({"kind": "linear"}, 24), ({"kind": "linear", "dim": 7}, 7), (MLP, 10), ({**MLP, "heads": 3}, 30)],
)
def test_heads_make_unit_vectors_of_their_width_in_fp32_under_bf16(fields: dict[str, Any], width: int) -> None:
    model = tiny_model(**both(**fields))
    assert model.embed_dim == width
    with torch.autocast("cpu", torch.bfloat16):
        rows = torch.cat(embeddings(model))
    assert rows.shape == (8, width)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double().norm(dim=1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_cosine_of_several_heads_is_the_mean_of_their_cosines() -> None:
    head = build_head(HeadConfig(**{**MLP, "heads": 3}), 24).double()
    assert isinstance(head, SeveralHeads)
    rows = torch.randn(6, 24, dtype=torch.float64)
    made = head(rows)
    cosines = [normalize(one(rows), dim=1) @ normalize(one(rows), dim=1).T for one in head.heads]
    torch.testing.assert_close(made @ made.T, sum(cosines) / 3, rtol=0, atol=1e-12)
    assert not torch.equal(cosines[0], cosines[1])


def test_towers_without_their_heads_are_the_plain_model() -> None:
    plain, headed = tiny_model(), tiny_model(**both(**MLP))
    towers = {name: tensor for name, tensor in headed.state_dict().items() if "_head." not in name}
    plain.load_state_dict(towers)
    expected = embeddings(plain)
    before = headed.before_head()
    headed.eval()
    with torch.no_grad():
        found = before.encode_image(some_images(4)), before.encode_text(*headed.tokenizer(TEXTS))
    after = embeddings(headed)
    headed.drop_heads()
    assert headed.config == plain.config
    for rows, dropped, wanted, other in zip(found, embeddings(headed), expected, after, strict=True):
        assert torch.equal(rows, wanted)
        assert torch.equal(dropped, wanted)
        assert other.shape != wanted.shape


def test_own_configuration_rebuilds_heads_and_seeds_differ() -> None:
    model = tiny_model(seed=3, **both(**MLP))
    again = build_model(ModelConfig.model_validate_json(model.config.model_dump_json()), seed=3)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    other = tiny_model(seed=4, **both(**MLP)).state_dict()["image_head.0.weight"]
    assert not torch.equal(other, model.state_dict()["image_head.0.weight"])
    assert not torch.equal(model.state_dict()["text_head.0.weight"], model.state_dict()["image_head.0.weight"])


def test_biases_and_norms_of_heads_are_kept_from_weight_decay() -> None:
    model = tiny_model(**both(**MLP))
    names = {name for name in no_weight_decay_names(model) if name.startswith("image_head.")}
    assert names == {f"image_head.{name}" for name in ("0.bias", "1.weight", "1.bias", "3.bias")}


def test_pretrained_towers_take_fresh_heads_and_own_heads_come_back(tmp_path: Path) -> None:
    for fields, file in (({}, "plain.safetensors"), (both(**MLP), "headed.safetensors")):
        stored = {name: tensor + 1 for name, tensor in tiny_model(**fields).state_dict().items()}
        save_tensors(tmp_path / file, stored)
    fresh = tiny_model(seed=2, **both(**MLP)).state_dict()
    loaded = tiny_model(seed=2, pretrained=str(tmp_path / "plain.safetensors"), **both(**MLP)).state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, fresh[name]) == ("_head." in name), name
    whole = tiny_model(seed=2, pretrained=str(tmp_path / "headed.safetensors"), **both(**MLP)).state_dict()
    assert not any(torch.equal(whole[name], fresh[name]) for name in whole if "_head." in name)
    with pytest.raises(UserError, match="another architecture"):
        tiny_model(pretrained=str(tmp_path / "headed.safetensors"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_head": MLP}, "image_head makes 10 dimensions, text_head 24"),
        (both(kind="reweight", heads=2), "model.image_head: reweight keeps the tower's 24 dimensions"),
        (both(kind="reweight", dim=12), "model.image_head: reweight keeps the tower's 24 dimensions"),
    ],
)
def test_heads_that_fit_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model(**fields)


def test_export_says_how_to_leave_heads_out_and_then_open_clip_agrees(tmp_path: Path) -> None:
    model = tiny_model(**both(**MLP)).eval()
    with pytest.raises(UserError, match=r"no counterpart of image_head \(mlp\); --before-head"):
        export_open_clip(model, tmp_path / "out", some_images(2), TEXTS)
    model.drop_heads()
    parity = export_open_clip(model, tmp_path / "out", some_images(2), TEXTS)
    assert max(parity.image, parity.text) < 1e-5
