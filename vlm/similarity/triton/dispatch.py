"""Which of two equal reductions runs: plain torch, or fused kernels where these are right and faster."""

import os
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlm.similarity.entry_weights import EntryWeights, EqualKeys

Reduction = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype | None], tuple[Tensor, Tensor]]

_LEAST_ENTRIES = 2**20  # below, either takes a few launches' time
_TRIAL_ROWS, _TRIAL_COLUMNS, _TRIAL_SCALE = 4096, 8192, 14.0
_REPEATS = 3
_LEAST_GAIN = 1.1  # a tie goes to plain torch, and seldom elsewhere at the next start
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative, of whole tensors

_chosen: dict[tuple[torch.device, torch.dtype, torch.dtype, int], Reduction | None] = {}


def fused_reduction(
    rows: Float[Tensor, "rows dim"], num_columns: int, matmul_dtype: torch.dtype | None, plain: Reduction
) -> Reduction | None:
    """`fused_log_sum_exp` where it is to take the place of `plain` for these rows; None where it is not.

    On CUDA (and in Triton's interpreter), at fp32 and bf16, from 2^20 entries on. The first call for a device, types
    and dim runs both on a random problem of 4096 x 8192: the fused path has to agree in values and gradients (1e-3 of a
    tensor's norm at fp32 products, 2e-2 at bf16) and to be a tenth faster. A kernel that fails or disagrees is given up
    with one warning. The answer is kept while the process lives.

    Ranks may answer differently without harm: both paths compute the same exact sums of this rank's own rows, and
    neither communicates. Only the last bits depend on the answer; a run that starts again may answer anew.
    """
    factors = matmul_dtype or rows.dtype
    if not _can_run(rows.device) or not {rows.dtype, factors} <= _AGREEMENT.keys():
        return None
    if len(rows) * num_columns < _LEAST_ENTRIES:
        return None
    key = (rows.device, rows.dtype, factors, rows.shape[1])
    if key not in _chosen:
        _chosen[key] = _try(rows, factors, plain)
    return _chosen[key]


def common_keys(
    row_weights: tuple[EntryWeights, ...], column_weights: tuple[EntryWeights, ...] | None = None
) -> tuple[Tensor | None, Tensor | None] | None:
    """The keys whose equal entries both directions leave out (none: a pair of None); None for any other weights.

    The column weights are the row weights where they are not given.
    """
    if column_weights is not None and column_weights != row_weights:
        return None
    if not row_weights:
        return None, None
    if len(row_weights) == 1 and isinstance(row_weights[0], EqualKeys) and not row_weights[0].keep:
        return row_weights[0].row_keys, row_weights[0].column_keys
    return None


def _can_run(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _try(like: Tensor, factors: torch.dtype, plain: Reduction) -> Reduction | None:
    try:
        # Triton is imported where it is about to run, and nowhere else.
        from vlm.similarity.triton.launch import fused_log_sum_exp

        with torch.inference_mode(False), torch.enable_grad():
            trial = _Trial(like, factors)
            results, expected = trial.run(fused_log_sum_exp), trial.run(plain)
            for one, other in zip(results, expected, strict=True):
                distance = float((one - other).norm() / other.norm())
                if not distance <= _AGREEMENT[factors]:  # NaN is no agreement
                    raise ArithmeticError(f"results off by {distance:.2g}")
            faster = trial.seconds(fused_log_sum_exp) * _LEAST_GAIN < trial.seconds(plain)
            return fused_log_sum_exp if faster else None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"fused kernels are not used on {like.device} ({reason}); plain torch computes the same"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None


class _Trial:
    """A random problem of unit rows against unit columns, each row without one of the columns."""

    def __init__(self, like: Tensor, matmul_dtype: torch.dtype) -> None:
        self._matmul_dtype, self._device = matmul_dtype, like.device
        generator = torch.Generator(like.device).manual_seed(0)
        rows, columns = (
            normalize(torch.randn(size, like.shape[1], device=like.device, generator=generator), dim=1)
            for size in (_TRIAL_ROWS, _TRIAL_COLUMNS)
        )
        self._rows = (_TRIAL_SCALE * rows).to(like.dtype).requires_grad_()
        self._columns = columns.to(like.dtype).requires_grad_()
        self._row_keys, self._column_keys = (torch.arange(len(some), device=like.device) for some in (rows, columns))

    def run(self, reduction: Reduction) -> tuple[Tensor, ...]:
        """Both log-sum-exps, and the gradients of their sum."""
        row, column = reduction(self._rows, self._columns, self._row_keys, self._column_keys, self._matmul_dtype)
        gradients = torch.autograd.grad(row.sum() + column.sum(), (self._rows, self._columns))
        return row.detach(), column.detach(), *gradients

    def seconds(self, reduction: Reduction) -> float:
        """The least time of some forward and backward passes."""
        times = []
        for _ in range(_REPEATS):
            self._wait()
            start = time.perf_counter()
            self.run(reduction)
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
