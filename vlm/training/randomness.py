"""Model randomness (dropout and the like) as a function of where a run is, so that none has to be saved."""

import hashlib

import torch


def step_seed(seed: int, step: int, rank: int, micro_batch: int = 0) -> int:
    """A 63-bit seed for the draws of one rank in one micro-batch of one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, step: int, rank: int, micro_batch: int = 0) -> None:
    """Make the draws that follow depend on this position alone."""
    torch.manual_seed(step_seed(seed, step, rank, micro_batch))
