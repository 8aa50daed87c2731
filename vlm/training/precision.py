"""The precision of the towers' products: as a recipe says it, and which one is the faster where it is left open."""

import time
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from vlm.config import Config
from vlm.measurements import measured_once

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

_ROWS, _WIDTH = 256, 512
_TURNS = 3


class ProductTimes(Config):
    """Seconds of one matrix product on this machine's CPU."""

    fp32: PositiveFloat
    bf16: PositiveFloat


def faster_precision() -> Precision:
    """bf16 where this machine's GPU has it, or its CPU is faster in it: many take thirty times as long as in fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    times = cpu_product_times()
    return "bf16" if times.bf16 < times.fp32 else "fp32"


def slow_precision(precision: Precision) -> str | None:
    """Words on bf16 where this machine's CPU computes, and is slower in it than in fp32; None elsewhere."""
    if precision == "fp32" or torch.cuda.is_available():
        return None
    times = cpu_product_times()
    ratio = times.bf16 / times.fp32
    if ratio < 1:
        return None
    return f"precision bf16: this processor takes {ratio:.1f} times as long for a product as in fp32"


def cpu_product_times() -> ProductTimes:
    """The times of a product of both precisions on the CPU, measured once on each machine."""
    threads = torch.get_num_threads()
    return measured_once("products", {"threads": threads}, ProductTimes, _measure)


def _measure() -> ProductTimes:
    factors = {dtype: torch.ones(_ROWS, _WIDTH, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = {dtype: min(_seconds(factor) for _ in range(_TURNS)) for dtype, factor in factors.items()}
    return ProductTimes(fp32=times[torch.float32], bf16=times[torch.bfloat16])


def _seconds(factor: Tensor) -> float:
    start = time.perf_counter()
    factor @ factor.T
    return time.perf_counter() - start
