"""A run of the comparison of objectives, on noise: as long as it works, the published command does."""

import torch

from benchmarks.objectives.photos import STORED, Photos
from benchmarks.objectives.run import Run, measure

NUM_PHOTOS, NUM_TOKENS = 24, 60


def test_a_run_ranks_every_image_and_every_caption() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (NUM_PHOTOS, 3, STORED, STORED), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, NUM_TOKENS - 1, (NUM_PHOTOS, 5, 8), generator=generator)
    tokens[:, :, -1] = NUM_TOKENS - 1  # the end of the text: the largest id
    photos = Photos(noise, tokens, torch.full((NUM_PHOTOS, 5), 8))
    run = Run("clip", batch=8, seed=0, lr=1e-3, num_samples=16, split="test", objective={"clip": 1.0})
    found = measure(run, {"train": photos, "test": photos})
    for way, queries in (("image_to_text", NUM_PHOTOS), ("text_to_image", 5 * NUM_PHOTOS)):
        assert len(found[way]) == queries
        assert 1 <= min(found[way]) <= max(found[way]) <= 5 * NUM_PHOTOS
