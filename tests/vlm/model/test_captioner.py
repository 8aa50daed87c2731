"""The captioning decoder: open_clip's CoCa on equal weights, causality, the class token, and every kind of tower."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from tests.vlm.model.hugging_face import save_text_model, save_vision_model, save_whole
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, normalised, perturb, some_images, tiny_model
from vlm.batch import DEGRADED, Images, Texts
from vlm.errors import UserError
from vlm.model.attach import freeze_unreached
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import export_open_clip
from vlm.model.foreign import ForeignFiles
from vlm.model.open_clip_names import to_open_clip
from vlm.model.tower_config import ImageTowerConfig, TowerContext
from vlm.outputs import PAIR

TINY: dict[str, Any] = {"layers": 2, "heads": 2, "queries": 5, "pooler_heads": 2}
CONVOLUTIONAL = {"vision_cfg": {"timm_model_name": "test_nfnet", "timm_proj": "linear", "image_size": 64}}
CLASS_TOKEN = {"embed_cls": True, "correct_cls_mask": True}
OUTPUTS = PAIR | {"text_likelihood"}


def coca_fields(text: dict[str, Any], pool: bool | str = True) -> dict[str, Any]:
    vision = {**VIT, "attentional_pool": pool, "attn_pooler_queries": 6, "attn_pooler_heads": 2, "output_tokens": True}
    return {
        "embed_dim": 32,
        "vision_cfg": vision,
        "text_cfg": {**TEXT, "output_tokens": True, **text},
        "multimodal_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
    }


def built(seed: int = 0, captioner: dict[str, Any] | None = None, **towers: Any) -> DualEncoder:
    parts = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}, **towers}
    model = build_model(
        ModelConfig.model_validate({"towers": parts, "captioner": captioner or TINY, "freeze_batch_norm": True}), seed
    )
    perturb(model)
    return model.eval()


def likelihood(model: DualEncoder, texts: list[str], images: Tensor | None = None) -> list[Tensor]:
    """log p of each token but the first, text by text."""
    batch = model.tokenizer(texts)
    images = some_images(len(texts)) if images is None else images
    made = model({"image": Images(images), "text": Texts(*batch)}, OUTPUTS)["text_likelihood"]
    return list(made[:, 0].split((batch.lengths - 1).tolist()))


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ({"embed_cls": True}, True),  # the mask of released weights, a column out of place
        ({}, True),
    ],
)
@torch.no_grad()
def test_logits_and_embeddings_are_those_of_open_clips_coca(tmp_path: Path, text: dict[str, Any], pool: Any) -> None:
    fields = coca_fields(text, pool)
    torch.manual_seed(3)
    theirs: Any = open_clip.CoCa(**fields).eval()
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.2)  # open_clip leaves it as memory was
    perturb(theirs)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    model = tiny_model(architecture={**fields, "custom_text": True}, pretrained=str(tmp_path / "weights.pt")).eval()
    assert model.notices == ()
    images = some_images(len(TEXTS))
    batch = model.tokenizer(TEXTS)
    full = torch.zeros(len(TEXTS), 16, dtype=torch.long)
    full[:, : batch.tokens.shape[1]] = batch.tokens
    pixels = normalised(images, model)
    expected = theirs(pixels, full)
    found = model({"image": Images(images), "text": Texts(*batch)}, OUTPUTS)
    torch.testing.assert_close(found["image"], expected["image_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["text"], expected["text_features"], rtol=0, atol=1e-5)
    log_p = log_softmax(expected["logits"].double(), dim=-1)
    for row, told in enumerate(found["text_likelihood"].split((batch.lengths - 1).tolist())):
        labels = full[row, 1 : len(told) + 1]
        torch.testing.assert_close(
            told[:, 0].double(), log_p[row, : len(told)].gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(told[:, 1].double(), log_p[row, : len(told)].mean(1), rtol=0, atol=1e-5)
    parity = export_open_clip(model, tmp_path / "exported", images, TEXTS)
    assert parity.likelihood is not None
    assert parity.likelihood <= 1e-5
    returned = to_open_clip(model)
    for name, tensor in theirs.state_dict().items():
        if name in returned and name != "logit_scale":
            assert torch.equal(returned[name].reshape(tensor.shape), tensor), name
    assert {name for name in theirs.state_dict() if "mask" not in name} == set(returned)


def test_an_export_whose_decoder_computes_something_else_is_refused(tmp_path: Path) -> None:
    """open_clip has one activation for all parts, here that of the towers; this decoder has another."""
    vision = {**VIT, "attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 2}
    towers = {
        "embed_dim": 32,
        "image": {"vision_cfg": vision, "quick_gelu": True},
        "text": {"text_cfg": {**TEXT, "embed_cls": True}, "quick_gelu": True},
    }
    model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": {"layers": 2, "heads": 2}})).eval()
    perturb(model)
    with pytest.raises(UserError, match=r"open_clip computes something else .* log-likelihoods of tokens by up to"):
        export_open_clip(model, tmp_path / "exported", some_images(4), TEXTS)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("pooler", ["cascade", "parallel", "single", "tower", "embedding"])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(pooler: str) -> None:
    model = built(captioner={**TINY, "pooler": pooler}, text={"text_cfg": {**TEXT, **CLASS_TOKEN}})
    tokens, lengths = model.tokenizer(TEXTS[3:])
    image = Images(some_images(1))

    def told(ids: Tensor) -> Tensor:
        made: Tensor = model({"image": image, "text": Texts(ids, lengths)}, OUTPUTS)["text_likelihood"]
        return made[:, 1]  # the mean of log p, whatever the labels are

    before = told(tokens)
    for place in range(1, int(lengths) - 1):
        changed = tokens.clone()
        changed[0, place] = 1000
        after = told(changed)
        assert torch.equal(after[:place], before[:place])
        assert not torch.equal(after[place:], before[place:])


@pytest.mark.parametrize("text", [TEXT, {**TEXT, **CLASS_TOKEN}])
@torch.no_grad()
def test_padding_changes_neither_embedding_nor_likelihood(text: dict[str, Any]) -> None:
    model = built(text={"text_cfg": text})
    assert model.text.may_shorten
    alone = [model.encode_text(*model.tokenizer([one])) for one in TEXTS]
    torch.testing.assert_close(model.encode_text(*model.tokenizer(TEXTS)), torch.cat(alone), rtol=0, atol=1e-6)
    images = some_images(len(TEXTS))
    together = likelihood(model, TEXTS, images)
    for row, one in enumerate(TEXTS):
        torch.testing.assert_close(likelihood(model, [one], images[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_class_token_sees_all_of_its_text_and_no_token_sees_it() -> None:
    model = built(text={"text_cfg": {**TEXT, **CLASS_TOKEN}})
    tower: Any = model.text
    tokens, lengths = model.tokenizer(TEXTS)
    before = model.text(tokens, lengths)
    for place in range(int(lengths[3])):
        changed = tokens.clone()
        changed[3, place] = 1000
        assert not torch.allclose(model.encode_text(changed, lengths)[3], model.encode_text(tokens, lengths)[3])
    tower.tower.cls_emb.add_(1.0)
    after = model.text(tokens, lengths)
    assert torch.equal(before.tokens, after.tokens)
    assert not torch.equal(before.embedding, after.embedding)


@torch.no_grad()
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    model = built()
    assert model.decoder is not None
    model.decoder.vocabulary.weight.zero_()
    told = torch.cat(likelihood(model, TEXTS))
    assert told.tolist() == pytest.approx([-float(torch.tensor(49408.0).log())] * len(told), rel=1e-6)


@pytest.mark.parametrize("pooler", ["cascade", "tower", "embedding"])
@torch.no_grad()
def test_without_cross_attention_the_image_is_not_seen(pooler: str) -> None:
    model = built(captioner={**TINY, "pooler": pooler})
    decoder: Any = model.decoder
    images = some_images(len(TEXTS))
    assert not torch.allclose(
        torch.cat(likelihood(model, TEXTS, images)), torch.cat(likelihood(model, TEXTS, 255 - images))
    )
    for cross in decoder.cross_attn:
        cross.attn.out_proj.weight.zero_()
        cross.attn.out_proj.bias.zero_()
    assert torch.equal(torch.cat(likelihood(model, TEXTS, images)), torch.cat(likelihood(model, TEXTS, 255 - images)))


@torch.no_grad()
def test_poolers_do_not_know_the_order_of_patches() -> None:
    model = built(captioner={**TINY, "pooler": "cascade"})
    assert model.image_pooler is not None
    tokens = torch.randn(2, 16, 32)
    straight, turned = model.image_pooler(tokens), model.image_pooler(tokens.flip(1))
    torch.testing.assert_close(straight.embedding, turned.embedding, rtol=0, atol=1e-6)
    torch.testing.assert_close(straight.tokens, turned.tokens, rtol=0, atol=1e-6)


def kinds_of_image(folder: Path) -> dict[str, dict[str, Any]]:
    save_vision_model(folder / "vit")
    return {
        "ViT": {"vision_cfg": VIT},
        "ResNet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
        "timm convolution": {"vision_cfg": {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32}},
        "timm ViT": {"vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160}},
        "transformers": {"transformers": str(folder / "vit"), "pool": "first"},
    }


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "timm convolution", "timm ViT", "transformers"])
@pytest.mark.parametrize("pooler", ["cascade", "tower"])
def test_every_kind_of_image_tower_shows_its_tokens(tmp_path: Path, kind: str, pooler: str) -> None:
    model = built(captioner={**TINY, "pooler": pooler}, image=kinds_of_image(tmp_path)[kind])
    images = some_images(2, model.image_spec.size)
    found = model({"image": Images(images), "text": Texts(*model.tokenizer(TEXTS[:2]))}, OUTPUTS)
    trainable = [parameter for parameter in model.image.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found["text_likelihood"].sum(), trainable, allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 3
    other = model({"image": Images(255 - images), "text": Texts(*model.tokenizer(TEXTS[:2]))}, OUTPUTS)
    assert not torch.allclose(found["text_likelihood"], other["text_likelihood"])
    if pooler == "tower":
        plain = build_model(model.config.model_copy(update={"captioner": None})).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(plain.encode_image(images), found["image"], rtol=0, atol=1e-6)
        torch.testing.assert_close(plain.encode_text(*plain.tokenizer(TEXTS[:2])), found["text"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "tf_efficientnet_lite0"])
@torch.no_grad()
def test_a_finer_map_of_a_timm_trunk_is_timms_own(name: str) -> None:
    size = 160 if name == "test_vit" else 64
    vision = {"timm_model_name": name, "timm_proj": "linear", "image_size": size}
    model = built(captioner={**TINY, "pooler": "tower", "feature_map": -2}, image={"vision_cfg": vision})
    images = some_images(2, size)
    embedding, found = model.encode_image_and_tokens(images)
    pixels = model.image.pixels(images)
    trunk: Any = model.image.trunk.trunk
    if name == "test_vit":
        patches = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels))))
        expected = trunk.blocks[:-1](patches)
    else:
        layers = (
            [trunk.stem, *trunk.stages[:3]] if name == "test_nfnet" else [trunk.conv_stem, trunk.bn1, *trunk.blocks[:5]]
        )
        expected = torch.nn.Sequential(*layers)(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding, model.encode_image(images), rtol=0, atol=0)


def test_the_configuration_rebuilds_the_model() -> None:
    model = built(captioner={"preset": "tiny", "queries": 3})
    config = ModelConfig.model_validate(model.config.model_dump(mode="json"))
    again = build_model(config, load_pretrained=False)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert config.captioner.queries == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text": {"text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}}},
            "depend on earlier tokens alone",
        ),
        ({"captioner": {**TINY, "heads": 3}}, "width of 32 does not divide into 3 heads"),
        ({"captioner": {**TINY, "pooler_heads": 3}}, "model.captioner: "),
        (
            {"image": {"vision_cfg": {**VIT, "attentional_pool": True}}, "captioner": {**TINY, "pooler": "cascade"}},
            "model.captioner.pooler: found cascade; the image tower pools by attention itself",
        ),
        ({"captioner": {**TINY, "feature_map": -2}}, "a VisionTransformer lists no feature maps, as timm's models do"),
        (
            {"image": CONVOLUTIONAL, "captioner": {**TINY, "feature_map": 9}},
            "model.captioner: there is no feature map 9: the trunk lists 5",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**fields)


def test_a_bidirectional_transformers_tower_is_refused(tmp_path: Path) -> None:
    save_text_model(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model\.captioner"):
        built(text={"transformers": str(tmp_path / "bert"), "context_length": 16})


@pytest.mark.parametrize("kind", ["clip", "gpt2"])
@torch.no_grad()
def test_a_causal_model_of_transformers_is_captioned(tmp_path: Path, kind: str) -> None:
    if kind == "clip":
        save_whole(tmp_path / "text", "clip")
        text = {"transformers": str(tmp_path / "text"), "pool": "own", "context_length": 16}
    else:
        save_text_model(tmp_path / "text", "gpt2")
        text = {"transformers": str(tmp_path / "text"), "pool": "end", "context_length": 16}
    model = built(text=text)
    tokens, lengths = model.tokenizer(TEXTS[3:])
    image = Images(some_images(1))
    before = model({"image": image, "text": Texts(tokens, lengths)}, OUTPUTS)["text_likelihood"][:, 1]
    changed = tokens.clone()
    changed[0, 3] = 4 + (int(changed[0, 3]) - 3) % 5
    after = model({"image": image, "text": Texts(changed, lengths)}, OUTPUTS)["text_likelihood"][:, 1]
    torch.testing.assert_close(after[:3], before[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(after[3:], before[3:])


def test_a_network_of_ones_own_shows_its_tokens_by_an_attribute() -> None:
    place = f"{__name__}:ShownConfig"
    model = built(image={place: {}})
    assert model.image_pooler is not None
    found = model({"image": Images(some_images(2)), "text": Texts(*model.tokenizer(TEXTS[:2]))}, OUTPUTS)
    assert found["image"].shape == (2, 24)
    place = "tests.vlm.model.own_towers:OwnImage"
    with pytest.raises(UserError, match=r"nobody knows where a Patches has its tokens \(it has no `output_tokens`\)"):
        built(image={place: {"width": 12}})


class Shown(torch.nn.Module):
    """Mean colours of patches, which it shows beside their projected mean when it is asked to."""

    output_tokens = False

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(3, embed_dim)

    def forward(self, pixels: Tensor) -> Any:
        tokens = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        embedding = self.projection(tokens.mean(1))
        return (embedding, tokens) if self.output_tokens else embedding


class ShownConfig(ImageTowerConfig):
    """An image tower of one's own that shows its tokens."""

    def build(self, context: TowerContext) -> torch.nn.Module:
        return Shown(context.embed_dim)


@pytest.mark.parametrize("pooler", ["cascade", "tower"])
@torch.no_grad()
def test_before_the_head_it_is_the_same_model_without(pooler: str) -> None:
    head = {"kind": "linear", "dim": 10}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    fields = {"towers": towers, "captioner": {**TINY, "pooler": pooler}, "image_head": head, "text_head": head}
    model = build_model(ModelConfig.model_validate(fields)).eval()
    tokens = model.tokenizer(TEXTS)
    reader = model.before_head()
    image, text = reader.encode_image(some_images(2)), reader.encode_text(*tokens)
    assert (image.shape, text.shape) == ((2, 24), (4, 24))
    model.drop_heads()
    assert torch.equal(model.encode_image(some_images(2)), image)
    assert torch.equal(model.encode_text(*tokens), text)


def test_a_locked_text_tower_keeps_its_weights_and_its_decoder_learns() -> None:
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    fields = {"towers": towers, "captioner": TINY, "lock": {"text": {"all_but": 1}, "image": "all"}}
    model = build_model(ModelConfig.model_validate(fields))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "resblocks.0" in name and name.startswith("text.")} == set()
    assert any(name.startswith("text.transformer.resblocks.1.attn") for name in trained)
    assert any(name.startswith("decoder.resblocks.0") for name in trained)
    assert not any(name.startswith("image.trunk.transformer") for name in trained)
    assert [block.training for block in model.text.blocks()] == [False, True]


def test_what_no_output_reaches_is_frozen() -> None:
    model = built(captioner={**TINY, "pooler": "parallel"})
    unreached = set(freeze_unreached(model, PAIR))
    groups = {name.partition(".")[0] for name in unreached}
    assert groups == {"decoder", "image_pooler", "image"}  # the trunk's own projection, which a pooler replaces
    assert all(name.startswith("image_pooler.captioning") for name in unreached if name.startswith("image_pooler"))
    assert freeze_unreached(model, PAIR) == []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.image_pooler.projection.weight.requires_grad_(True)  # type: ignore[union-attr]
    assert freeze_unreached(model, frozenset({DEGRADED, "text"})) == []  # the image tower sees copies alone
    assert freeze_unreached(model, frozenset({"text"})) == ["image_pooler.projection.weight"]


def test_without_its_decoder_a_model_is_exported(tmp_path: Path) -> None:
    text = {"text_cfg": {**TEXT, "hf_tokenizer_name": "vlm:scenes", "vocab_size": 502}}
    model = built(captioner={**TINY, "pooler": "tower", "feature_map": -2}, image=CONVOLUTIONAL, text=text)
    images, texts = some_images(4, 64), ["two red stars", "3 small circles above a heart", "un café", ""]
    with pytest.raises(UserError, match="--without-decoder exports the dual encoder alone"):
        export_open_clip(model, tmp_path / "refused", images, texts)
    embeddings = model.encode_image(images), model.encode_text(*model.tokenizer(texts))
    model.drop_decoder()
    parity = export_open_clip(model, tmp_path / "exported", images, texts)
    assert max(parity.image, parity.text) < 1e-5
    again = build_model(model.config, load_pretrained=False, files=ForeignFiles(model.files))
    again.load_state_dict(model.state_dict())
    again.eval()
    found = again.encode_image(images), again.encode_text(*again.tokenizer(texts))
    for one, other in zip(found, embeddings, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_decoder_whose_pooler_makes_the_embedding_stays() -> None:
    with pytest.raises(UserError, match=r"the captioner's pooler \(cascade\) makes the embedding of images"):
        built().drop_decoder()


def test_a_decoder_behind_a_tower_that_looks_ahead_is_left_out_of_an_architecture(tmp_path: Path) -> None:
    save_text_model(tmp_path / "bert")
    name = str(tmp_path / "bert")
    text = {"hf_model_name": name, "hf_tokenizer_name": name, "hf_proj_type": "linear", "context_length": 16}
    decoder = {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 20}
    fields = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": text, "multimodal_cfg": decoder}
    model = build_model(ModelConfig.model_validate({"architecture": fields}))
    assert model.decoder is None
    assert "its caption decoder (multimodal_cfg) is left out" in " ".join(model.notices)


def test_a_vocabulary_of_another_size_is_refused() -> None:
    fields = coca_fields({"embed_cls": True})
    fields["multimodal_cfg"]["vocab_size"] = 1000
    with pytest.raises(
        ValueError, match=r"multimodal_cfg.vocab_size: found 1000; the text tower's vocabulary has 49408"
    ):
        ModelConfig.model_validate({"architecture": fields})


def test_unit_norm() -> None:
    model = built()
    rows = model.encode_image(some_images(2))
    torch.testing.assert_close(normalize(rows, dim=1), rows)
