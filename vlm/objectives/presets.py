"""Objectives by one name: `objective: gap-cua`."""

from collections.abc import Mapping
from typing import Any

from vlm.errors import nearest

# The sums of Fahim et al., 2024, all weights 1. The paper fine-tunes them at a fixed temperature of 0.01
# (model.init_logit_scale: 100, learn_logit_scale: false).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gap-cua": {"clip": 1.0, "uniformity": 1.0, "alignment": 1.0},
    # CoCa: Yu et al., 2022, as open_clip trains it; see `caption` on what the weights mean.
    "coca": {"clip": 1.0, "caption": 2.0},
    "gap-cuaxu": {"clip": 1.0, "uniformity": {"cross": 1.0}, "alignment": 1.0},
}


def preset(name: str) -> dict[str, Any]:
    """The terms of a preset, as a recipe writes them. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"there is no objective preset {name!r}; {nearest(name, PRESETS)}")
    return dict(PRESETS[name])
