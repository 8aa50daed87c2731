"""What every spawned rank has imported before it starts."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import accelerate
import open_clip
import torch
import transformers

from tests.runtime_types import activate

activate()

__all__ = ["accelerate", "open_clip", "torch", "transformers"]
