"""Augmentation: torchvision's operations at the strengths and shares asked for, mistakes told in a line."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import v2

from data.images.augment import AugmentConfig, RandAugmentConfig, augmented
from data.randomness import Draws
from tests.data.images.photographs import photograph

IMAGE = torch.from_numpy(np.array(photograph((40, 40)))).permute(2, 0, 1).contiguous()


def seeded(transform: v2.Transform, draws: Draws) -> torch.Tensor:
    """torchvision's own result, had the process been seeded so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.integer(2**63))
        result: Tensor = transform(IMAGE)
    return result


@pytest.mark.parametrize(
    ("augment", "transform"),
    [
        (
            AugmentConfig(color_jitter=(0.4, 0.3, 0.2, 0.1), color_jitter_prob=1.0),
            v2.RandomApply([v2.ColorJitter(0.4, 0.3, 0.2, 0.1)], 1.0),
        ),
        (AugmentConfig(rand_augment=RandAugmentConfig(num_ops=3, magnitude=12)), v2.RandAugment(3, 12)),
        (AugmentConfig(gray_scale_prob=0.5), v2.RandomGrayscale(0.5)),
        (AugmentConfig(blur_prob=0.5, blur_sigma=(0.5, 1.5)), v2.RandomApply([v2.GaussianBlur(11, (0.5, 1.5))], 0.5)),
    ],
)
def test_each_operation_is_torchvisions(augment: AugmentConfig, transform: v2.Transform) -> None:
    assert augment.changes_pixels
    for number in range(8):
        assert torch.equal(augmented(IMAGE, augment, Draws(number)), seeded(transform, Draws(number)))


def test_operations_reach_the_share_of_the_views_asked_for() -> None:
    augment = AugmentConfig(gray_scale_prob=0.25)
    grey = 0
    for number in range(400):
        view = augmented(IMAGE, augment, Draws("grey", number))
        grey += torch.equal(view[0], view[1])
    assert abs(grey - 100) < 5 * 9


def test_nothing_is_on_by_default() -> None:
    assert not AugmentConfig().changes_pixels
    assert not AugmentConfig(flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.0).changes_pixels


@pytest.mark.parametrize(
    "mistake",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"blur_sigma": (0.0, 1.0)},
        {"color_jitter": (0.4, 0.4, 0.4, 0.6)},
        {"color_jitter": (0.4, -0.4, 0.4, 0.1)},
        {"gray_scale_prob": 1.5},
        {"max_pixels": 0},
        {"colour_jitter": None},
    ],
)
def test_mistakes_are_refused(mistake: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(mistake)
