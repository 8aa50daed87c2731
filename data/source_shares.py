"""The share of each source in the samples of a step: said outright, or what is left by weight."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_DIGITS = 9  # of shares that add up to 1
USUAL_SHARE = 1 / 32
"""Of a source with counterfactuals beside others (Paiss et al., 2023)."""


def _read(value: Any) -> Any:
    if isinstance(value, str) and value.count("/") == 1:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


_Number = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[
    float,
    BeforeValidator(_read, json_schema_input_type=_Number | Annotated[str, Field(pattern=r"^\s*\d+\s*/\s*\d+\s*$")]),
    Field(gt=0, le=1),
]
"""A number above 0 and up to 1, which may be written as 1/32."""


def weights_with_shares(weights: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Weights of all sources by which those with a share have it, and the others the rest in proportion to theirs.

    Raises:
        ValueError: the shares leave nothing for the others, or too little for themselves.
    """
    if not shares:
        return dict(weights)
    rest = round(1 - math.fsum(shares.values()), _DIGITS)
    others = {name: weight for name, weight in weights.items() if name not in shares}
    if rest < 0 or (rest > 0) != bool(others):
        left = "more than 1" if rest < 0 else "less than 1, and no source has the rest" if not others else "1"
        raise ValueError(f"shares: those of {', '.join(shares)} add up to {left}")
    total = sum(others.values())
    return {name: shares[name] if name in shares else rest * weight / total for name, weight in weights.items()}
