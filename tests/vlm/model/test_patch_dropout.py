"""Patches left out in training: as many of each image, any set as likely, drawn where the image is."""

import math
from collections import Counter
from itertools import combinations
from typing import Any

import open_clip
import pytest
import torch
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vlm.model.tiny import TEXT, VIT, some_images
from vlm.batch import Batch, Images, Texts
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.patch_dropout import PatchDropout, patch_dropouts, use_own_patch_dropout

TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
CONV = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}


def model_of(vision: dict[str, Any], **more: Any) -> DualEncoder:
    towers = {"embed_dim": 24, "image": {"vision_cfg": vision}, "text": {"text_cfg": TEXT}}
    return build_model(ModelConfig.model_validate({"towers": towers, **more}), seed=1)


@pytest.mark.parametrize(("tokens", "prob", "prefix"), [(50, 0.5, 1), (197, 0.75, 1), (16, 0.9, 0), (9, 0.99, 1)])
def test_as_many_tokens_are_kept_as_open_clip_keeps(tokens: int, prob: float, prefix: int) -> None:
    x = torch.randn(3, tokens, 4)
    theirs: Any = open_clip.transformer.PatchDropout(prob, exclude_first_token=bool(prefix))
    kept = PatchDropout(prob, prefix).train()(x)
    assert kept.shape == theirs(x).shape
    assert torch.equal(kept[:, :prefix], x[:, :prefix])
    for row, mine in zip(x, kept, strict=True):  # its own tokens, none twice
        places = [int((row == token).all(1).nonzero()) for token in mine]
        assert len(set(places)) == len(places)


def test_any_set_of_patches_is_as_likely() -> None:
    times, sets = 12_000, math.comb(5, 2)
    torch.manual_seed(0)
    tokens = torch.arange(6.0).view(1, 6, 1).expand(times, 6, 1)
    kept = PatchDropout(0.6, 1).train()(tokens)[:, 1:, 0]
    counts = Counter(tuple(row) for row in kept.sort(dim=1).values.int().tolist())
    assert set(counts) == set(combinations(range(1, 6), 2))
    deviation = math.sqrt(times / sets * (1 - 1 / sets))
    assert all(abs(count - times / sets) < 5 * deviation for count in counts.values())
    assert (kept[0] != kept[1]).any() or (kept[1] != kept[2]).any()  # each image has a choice of its own


def test_the_gradient_comes_home_to_the_kept_tokens() -> None:
    x = torch.randn(2, 9, 3, requires_grad=True)
    kept = PatchDropout(0.5, 1).train()(x)
    kept.sum().backward()
    assert x.grad is not None
    assert x.grad.unique().tolist() == [0, 1]
    assert x.grad[..., 0].sum(1).tolist() == [5, 5]


class _Devices(TorchDispatchMode):
    """The devices of all that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen |= {one.device.type for one in (made if isinstance(made, tuple | list) else [made])}
        return made


def test_nothing_is_drawn_elsewhere_and_copied() -> None:
    x = torch.empty(4, 17, 8, device="meta")
    with _Devices() as devices:
        assert PatchDropout(0.5, 1).train()(x).shape == (4, 9, 8)
    assert devices.seen == {"meta"}


def test_open_clips_module_is_replaced_and_timms_stays() -> None:
    trunk = model_of({**VIT, "patch_dropout": 0.25}).image.trunk
    assert isinstance(trunk.patch_dropout, PatchDropout)
    assert (trunk.patch_dropout.prob, trunk.patch_dropout.num_prefix) == (0.25, 1)

    class Other(open_clip.transformer.PatchDropout):  # type: ignore[misc]
        pass

    assert isinstance(trunk, open_clip.transformer.VisionTransformer)
    trunk.patch_dropout = other = Other(0.5)
    use_own_patch_dropout(trunk)
    assert trunk.patch_dropout is other
    with pytest.raises(ValueError, match=r"in a way of its own \(Other\)"):
        patch_dropouts(trunk)
    timm = model_of({**TIMM, "patch_dropout": 0.5})
    assert type(timm.image.trunk.get_submodule("trunk.patch_drop")) is TimmPatchDropout  # draws on the tokens' device
    assert timm.image.patch_dropout == 0.5


@pytest.mark.parametrize("vision", [VIT, {**VIT, "patch_dropout": 0.25}, TIMM, {**TIMM, "patch_dropout": 0.25}])
def test_a_batch_says_how_many_patches_are_left_out_in_training(vision: dict[str, Any]) -> None:
    model = model_of(vision)
    model.image.allow_patch_dropout()
    seen: list[int] = []
    block = model.image.blocks()[0]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    images = some_images(2, model.image_spec.size)
    for training, share in [(True, 0.0), (True, 0.5), (True, 0.75), (False, 0.75)]:
        model.train(training)
        model({"image": Images(images, patch_dropout=share)}, frozenset({"image"}))
    patches = seen[0] - 1
    assert seen == [patches + 1, patches // 2 + 1, patches // 4 + 1, patches + 1]


def test_whole_images_are_as_without() -> None:
    images = some_images(2, VIT["image_size"])
    plain, dropping = model_of(VIT), model_of({**VIT, "patch_dropout": 0.5})
    dropping.image.allow_patch_dropout()
    expected = plain.train().image(images)
    assert torch.equal(dropping.train().image(images, 0.0), expected)
    assert torch.equal(dropping.eval().image(images, 0.5), expected)


@pytest.mark.parametrize(
    ("vision", "more", "message"),
    [
        (CONV, {}, "a ConvNeXt leaves out no patches"),
        (VIT, {"lock": {"image": "all"}}, "a locked tower computes as in evaluation"),
    ],
)
def test_a_tower_that_cannot_is_refused(vision: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(vision, **more).image.allow_patch_dropout()


def test_a_batch_keeps_its_share_whatever_becomes_of_it() -> None:
    images, texts = Images(some_images(4, 8)), Texts(torch.ones(4, 3, dtype=torch.int64), torch.full((4,), 3))
    batch = Batch(0, torch.arange(4), tuple("abcd"), {"image": images, "text": texts}).with_patch_dropout(0.5)
    for changed in (batch, batch.take(1, 3), batch.to(torch.device("cpu")), Batch.cat([batch, batch])):
        image = changed.parts["image"]
        assert isinstance(image, Images)
        assert image.patch_dropout == 0.5
