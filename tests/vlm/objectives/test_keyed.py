"""Keyed random numbers: the same for a sample on whatever rank, spread as they should be, and unlike each other."""

import hashlib

import torch

from vlm.objectives.counter_rng import symmetric_beta, uniforms

IDS = torch.tensor([0, 1, -5, 2**62 + 11, 40])
ALL_BITS = 2**64 - 1


def finished(word: int) -> int:
    """SplitMix64's output function, in whole numbers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & ALL_BITS
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & ALL_BITS
    return word ^ (word >> 31)


def test_numbers_are_those_of_splitmix_from_a_hash_of_the_key() -> None:
    assert finished(1234567 + 0x9E3779B97F4A7C15 & ALL_BITS) == 6457827717110365317  # its published first output
    name = int.from_bytes(hashlib.blake2b(b"mix\x1f3\x1f12", digest_size=8).digest(), "little")
    expected = [
        [
            (finished(finished((i & ALL_BITS) ^ name) + place * 0x9E3779B97F4A7C15 & ALL_BITS) >> 11) / 2**53
            for place in (1, 2, 3)
        ]
        for i in IDS.tolist()
    ]
    found = uniforms(3, 12, IDS, "mix", 3)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


def test_a_sample_draws_the_same_among_whichever_rows() -> None:
    everyone = uniforms(0, 5, IDS, "mix", 4)
    assert torch.equal(uniforms(0, 5, IDS[[3, 1]], "mix", 4), everyone[[3, 1]])
    assert torch.equal(uniforms(0, 5, IDS, "mix", 2), everyone[:, :2])
    assert uniforms(0, 5, IDS[:0], "mix", 4).shape == (0, 4)


def test_numbers_are_uniform_and_unrelated_between_samples_steps_seeds_and_streams() -> None:
    ids = torch.arange(100_000)
    drawn = [
        uniforms(0, 5, ids, "mix", 2)[:, 0],
        uniforms(0, 5, ids, "mix", 2)[:, 1],
        uniforms(0, 6, ids, "mix", 1)[:, 0],
        uniforms(1, 5, ids, "mix", 1)[:, 0],
        uniforms(0, 5, ids, "other", 1)[:, 0],
        uniforms(0, 5, ids + 1, "mix", 1)[:, 0],
    ]
    places = (torch.arange(len(ids)) + 0.5) / len(ids)
    for numbers in drawn:
        assert (numbers.sort().values - places).abs().max() < 2 / len(ids) ** 0.5  # Kolmogorov-Smirnov, p ~ 7e-4
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / len(ids) ** 0.5


def test_symmetric_beta_has_its_distribution() -> None:
    ids = torch.arange(100_000)
    numbers = symmetric_beta(0, 1, ids, "l", 2.0).sort().values
    places = (torch.arange(len(ids)) + 0.5) / len(ids)
    assert (3 * numbers**2 - 2 * numbers**3 - places).abs().max() < 2 / len(ids) ** 0.5
    for shape in (0.7, 1.6, 5.0):
        numbers = symmetric_beta(0, 2, ids, "l", shape)
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = (grid * (1 - grid)) ** (shape - 1)
        for power in (1, 2, 4):
            moment = float((density * grid**power).sum() / density.sum())
            assert abs(float((numbers**power).mean()) - moment) < 5 * float((numbers**power).std()) / len(ids) ** 0.5
        assert numbers.min() >= 0
        assert numbers.max() <= 1
