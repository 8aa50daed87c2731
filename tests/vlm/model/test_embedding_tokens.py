"""A decoder that looks at an embedding, and texts' embeddings that stand in for images' (CLOSE)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from tests.vlm.model.tiny import TEXT, TEXTS, VIT, perturb, some_images
from vlm.batch import Images, StandIns, Texts
from vlm.errors import UserError
from vlm.model.attach import freeze_unreached
from vlm.model.build import build_model
from vlm.model.captioner import CaptionDecoder, NextToken
from vlm.model.captioner_config import GapConfig
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.embedding_tokens import ModalityGap
from vlm.model.exchange import export_open_clip
from vlm.model.gap_statistics import GapStatistics, weights_of
from vlm.objectives.counter_rng import normals, words

CAPTIONER = {"pooler": "embedding", "layers": 2, "heads": 2}
FROM_TEXT = frozenset({"text_likelihood_from_text"})


def built(image: Any = None, head: Any = None, lock: Any = None, **captioner: Any) -> DualEncoder:
    towers = {"embed_dim": 24, "image": image or {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    fields = {"towers": towers, "captioner": {**CAPTIONER, **captioner}, "image_head": head, "text_head": head}
    model = build_model(ModelConfig.model_validate({**fields, **({"lock": lock} if lock else {})}))
    perturb(model)
    return model.eval()


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def draws(count: int, step: int = 0) -> Tensor:
    return words(0, step, torch.arange(count), "stand-in")


def pairs(count: int = 4000, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Images and texts that differ by a Gaussian of unequal axes about a mean."""
    texts = rows(count, dim)
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return texts + 0.3 * noise @ torch.diag(torch.linspace(0.1, 1, dim).double()) + torch.linspace(-1, 1, dim), texts


def gap(dim: int, statistics: GapStatistics | None = None, **fields: Any) -> ModalityGap:
    made = ModalityGap(GapConfig.model_validate(fields), dim).double()
    if statistics is not None:
        made.fill(statistics)
    return made


def test_without_noise_and_correction_and_in_evaluation_a_text_stays_as_it_is() -> None:
    texts = rows(5, 16)
    assert torch.equal(gap(16, noise=0.0)(texts, draws(5)), texts)
    assert torch.equal(gap(16, noise=0.3).eval()(texts, draws(5)), texts)
    assert torch.equal(gap(16, noise=0.3)(texts), texts)
    assert not torch.equal(gap(16, noise=0.3)(texts, draws(5)), texts)


@pytest.mark.parametrize("correction", ["none", "mean", "covariance"])
def test_what_stands_in_is_of_unit_norm(correction: str) -> None:
    images, texts = pairs()
    statistics = None if correction == "none" else GapStatistics.of(images, texts)
    moved = gap(8, statistics, noise=0.2, correction=correction)(texts, draws(len(texts)))
    assert_close(moved.norm(dim=1), torch.ones(len(texts), dtype=torch.float64))


def test_noise_is_sigma_root_d_long() -> None:
    """Of a unit vector t the noised one leaves t by an angle whose tangent is the noise's part across t."""
    dim, sigma, texts = 256, 0.04, rows(2000, 256)
    moved = gap(dim, noise=sigma)(texts, draws(2000))
    along = (moved * texts).sum(1)
    tangents = (1 - along.square()).sqrt() / along
    assert tangents.median().item() == pytest.approx(sigma * dim**0.5, rel=0.02)


def test_the_mean_shift_takes_the_centroid_of_texts_to_that_of_images() -> None:
    images, texts = pairs()
    moved = gap(8, GapStatistics.of(images, texts), noise=0.0, correction="mean")
    assert_close((texts + moved.shift).mean(0), images.mean(0), rtol=0, atol=1e-12)
    assert_close(moved(texts), normalize(texts + images.mean(0) - texts.mean(0), dim=1), rtol=0, atol=1e-12)
    assert torch.equal(moved(texts), moved.eval()(texts, draws(len(texts))))


def test_drawn_differences_have_mean_and_covariance_of_the_pairs() -> None:
    images, texts = pairs()
    differences, statistics = images - texts, GapStatistics.of(images, texts)
    assert_close(statistics.covariance, torch.cov(differences.T, correction=0))
    assert_close(statistics.root @ statistics.root, statistics.covariance)
    many = 40_000
    layer = gap(8, statistics, noise=0.0, correction="covariance", spread=2.0)
    scale = 1e6  # so long a text keeps its direction: what is added can be read off
    text = torch.zeros(many, 8, dtype=torch.float64)
    text[:, 0] = scale
    moved = layer(text, draws(many))
    added = moved[:, 1:] / moved[:, :1] * scale
    assert_close(added.mean(0), differences.mean(0)[1:], rtol=0, atol=0.02)
    assert_close(torch.cov(added.T), 4 * statistics.covariance[1:, 1:], rtol=0, atol=0.01)


def test_draws_are_a_samples_own_and_others_at_another_step() -> None:
    texts, layer = rows(6, 16), gap(16, noise=0.3)
    together = layer(texts, draws(6))
    assert torch.equal(layer(texts[[4, 1]], draws(6)[[4, 1]]), together[[4, 1]])
    assert not torch.isclose(layer(texts, draws(6, step=1)), together).all(1).any()


def test_normal_numbers_are_normal_and_unrelated() -> None:
    drawn = normals(draws(50_000), 3, "noise")
    other = normals(draws(50_000), 1, "difference")
    places = (torch.arange(50_000) + 0.5) / 50_000
    for column in drawn.T:
        assert (torch.special.ndtr(column).sort().values - places).abs().max() < 2 / 50_000**0.5
    correlations = torch.corrcoef(torch.cat([drawn, other], 1).T) - torch.eye(4)
    assert correlations.abs().max() < 5 / 50_000**0.5


@pytest.mark.parametrize("head", [None, {"kind": "linear", "dim": 10}])
@torch.no_grad()
def test_the_decoder_sees_a_linear_map_of_the_embedding_behind_the_head(head: Any) -> None:
    model = built(head=head, gap={"noise": 0.3})
    assert isinstance(model.decoder, CaptionDecoder)
    assert model.embedding_tokens is not None
    linear, texts = model.embedding_tokens.projection, Texts(*model.tokenizer(TEXTS))
    inputs = {"image": Images(some_images(4)), "text": texts}
    stand_ins = StandIns(torch.tensor([1, -1, 0, 0]), draws(4))
    found = model({**inputs, "text_stand_ins": stand_ins}, frozenset({"text_likelihood"}) | FROM_TEXT)
    image, text = model.encode_image(some_images(4)), model.encode_text(texts.tokens, texts.lengths)
    states: Any = model.text(texts.tokens, texts.lengths)
    for name, shown in (("text_likelihood", image), ("text_likelihood_from_text", text[[1, 0, 2, 3]])):
        tokens = (shown @ linear.weight.T + linear.bias).reshape(4, 4, 32)
        made = model.decoder(states.tokens, tokens)
        assert isinstance(made, NextToken)
        log_p = torch.log_softmax(made.states @ model.decoder.vocabulary.weight, 2)
        told = [
            log_p[row, place, texts.tokens[row, place + 1]]
            for row in range(4)
            for place in range(int(texts.lengths[row]) - 1)
        ]
        assert_close(found[name][:, 0], torch.stack(told), rtol=0, atol=1e-5)
    assert torch.equal(model.encode_image_and_tokens(some_images(4))[1], model.embedding_tokens(image))


def test_from_a_text_neither_images_nor_embeddings_learn() -> None:
    model = built(lock={"image": "all", "text": "all"}).train()
    for tower in (model.image, model.image_head):
        tower.register_forward_pre_hook(lambda *_: pytest.fail("an image is computed"))
    unreached = freeze_unreached(model, FROM_TEXT)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert {name.partition(".")[0] for name in trained} == {"decoder", "embedding_tokens", "logit_scale"}
    assert [name for name in unreached if not name.startswith("image")] == ["text.text_projection"]


def test_a_tower_whose_tokens_nobody_knows_is_looked_at_by_its_embedding() -> None:
    place = "tests.vlm.model.own_towers:OwnImage"
    model = built(image={place: {"width": 12}})
    assert model.encode_image_and_tokens(some_images(2))[1].shape == (2, 4, 32)
    pooling = {"vision_cfg": {**VIT, "attentional_pool": True}}
    assert built(image=pooling).encode_image_and_tokens(some_images(2))[1].shape == (2, 4, 32)
    assert built(queries=7, preset="tiny", width=16).encode_image_and_tokens(some_images(2))[1].shape == (2, 7, 16)


def test_statistics_come_from_a_file_and_stay_in_the_model(tmp_path: Path) -> None:
    plain = built()
    images, texts = pairs(100, 24)
    statistics = GapStatistics.of(images, texts)
    config = {"noise": 0.1, "correction": "covariance", "statistics": str(tmp_path / "gap.safetensors")}
    fresh = build_model(plain.config)
    statistics.write(tmp_path / "gap.safetensors", weights_of(fresh), "--out")
    captioner = {**CAPTIONER, "gap": config}
    fields = {**plain.config.model_dump(mode="json"), "captioner": captioner}
    model = build_model(ModelConfig.model_validate(fields))
    assert model.embedding_tokens is not None
    assert_close(model.embedding_tokens.gap.shift, (images.mean(0) - texts.mean(0)).float())
    (tmp_path / "gap.safetensors").unlink()
    again = build_model(ModelConfig.model_validate(model.config.model_dump(mode="json")), load_pretrained=False)
    again.load_state_dict(model.state_dict())
    assert again.embedding_tokens is not None
    assert_close(
        again.embedding_tokens.gap.root.double() @ again.embedding_tokens.gap.root.double(), statistics.covariance
    )
    assert "gap.safetensors" not in model.config.model_dump_json()


def test_statistics_of_anything_else_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "gap.safetensors"

    def refused(words_of: str) -> None:
        with pytest.raises(UserError, match=rf"^statistics: .*{words_of}") as caught:
            GapStatistics.read(path, "mine", 24, "statistics")
        assert "\n" not in str(caught.value)

    refused("`vlm gap` writes it")
    path.write_bytes(b"no tensors at all")
    refused("`vlm gap` writes it")
    GapStatistics.of(*pairs(50, 24)).write(path, "another's", "--out")
    refused("is of a model with other weights")
    GapStatistics.of(*pairs(50, 8)).write(path, "mine", "--out")
    refused("is of embeddings of 8 dimensions; the model's have 24")
    GapStatistics.of(*pairs(50, 24)).write(path, "mine", "--out")
    stored = bytearray(path.read_bytes())
    stored[-3] ^= 1
    path.write_bytes(stored)
    refused("is damaged")
    broken = GapStatistics.of(*pairs(50, 24))
    broken.covariance[3, 5] = torch.nan
    broken.write(path, "mine", "--out")
    refused("has values that are no finite numbers")


def test_embeddings_that_are_no_finite_numbers_have_no_statistics() -> None:
    images, texts = pairs(50, 8)
    images[7, 2] = torch.nan
    with pytest.raises(UserError, match=r"^the model's embeddings of 50 pairs are no finite numbers$"):
        GapStatistics.of(images, texts)


@torch.no_grad()
def test_equal_pairs_have_no_spread() -> None:
    """A covariance of 0 has the root 0, and draws move nothing but by the mean."""
    texts = rows(5, 8)
    layer = gap(8, GapStatistics.of(texts, texts), noise=0.0, correction="covariance")
    assert_close(layer(texts, draws(5)), texts, rtol=0, atol=1e-12)


def test_a_decoder_that_looks_at_the_embedding_is_left_out_of_an_export(tmp_path: Path) -> None:
    model = built()
    with pytest.raises(UserError, match=r"\(pooler embedding\).*--without-decoder exports") as refused:
        export_open_clip(model, tmp_path / "refused", some_images(2), TEXTS)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "refused").exists()
    model.drop_decoder()
    parity = export_open_clip(model, tmp_path / "exported", some_images(2), TEXTS)
    assert max(parity.image, parity.text) < 1e-5


@pytest.mark.parametrize(
    ("statistics", "message"),
    [(None, "correction: mean needs the file that `vlm gap` writes"), ("other", "is of a model with other weights")],
)
def test_a_model_without_its_statistics_is_refused(tmp_path: Path, statistics: str | None, message: str) -> None:
    if statistics is not None:
        statistics = str(tmp_path / statistics)
        GapStatistics.of(*pairs(50, 24)).write(Path(statistics), "another's", "--out")
    with pytest.raises(UserError, match=rf"^model\.captioner\.gap\.statistics: .*{message}"):
        built(gap={"correction": "mean", "statistics": statistics})


def test_the_identity_is_of_what_makes_embeddings() -> None:
    model = built()
    before = weights_of(model)
    with torch.no_grad():
        for part in (model.decoder, model.embedding_tokens):
            assert part is not None
            next(part.parameters()).add_(1)
        model.logit_scale.add_(1)
        assert weights_of(model) == before
        plain = build_model(model.config.model_copy(update={"captioner": None}))
        plain.load_state_dict(model.state_dict(), strict=False)
        assert weights_of(plain) == before
        next(model.text.parameters()).view(-1)[0] += 1e-3
    assert weights_of(model) != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pooler": "cascade", "gap": {}},
            "gap: found .* means nothing with pooler: cascade; it is for pooler: embedding",
        ),
        ({"gap": {"statistics": "a"}}, "statistics: found 'a', which means nothing with correction: none"),
        ({"gap": {"spread": 3.0}}, "spread: found 3.0, which means nothing with correction: none"),
        ({"gap": {"noise": -0.1}}, "noise"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**fields)


def test_heads_that_the_decoder_looks_behind_stay() -> None:
    model = built(head={"kind": "linear", "dim": 10})
    with pytest.raises(UserError, match="looks at the embedding behind the heads"):
        model.drop_heads()
