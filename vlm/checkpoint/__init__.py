"""Checkpoints: named tensors under a manifest, below model and training."""
