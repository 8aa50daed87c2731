"""Fused kernels equal a float64 double loop in Triton's interpreter, compile for GPUs, and give way where they fail.

The interpreter is chosen before Triton is first imported: the kernels run in a process of their own.
"""

import math
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime_types import activate
from vlm.similarity.entry_weights import AtLeast, EqualKeys
from vlm.similarity.tiles import Columns
from vlm.similarity.triton import dispatch

pytest.importorskip("triton")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Calls of functions in a process where Triton interprets."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)


def _prepare() -> None:
    activate()
    warnings.simplefilter("error")
    torch.set_num_threads(1)


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    rows = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def written_out(x: Tensor, y: Tensor, row_keys: list[int], column_keys: list[int]) -> tuple[Tensor, Tensor]:
    """Both sums, entry by entry."""

    def log_sum(logits: list[Tensor]) -> Tensor:
        return torch.stack(logits).logsumexp(0) if logits else x.new_tensor(-math.inf)

    def counts(i: int, j: int) -> bool:
        return not row_keys or row_keys[i] != column_keys[j]

    n, m = len(x), len(y)
    row_lse = [log_sum([x[i] @ y[j] for j in range(m) if counts(i, j)]) for i in range(n)]
    column_lse = [log_sum([x[i] @ y[j] for i in range(n) if counts(i, j)]) for j in range(m)]
    return torch.stack(row_lse), torch.stack(column_lse)


def with_gradients(results: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Results, and the gradients of their sum with factors of both signs over what is finite."""
    loss = torch.zeros((), dtype=results[0].dtype)
    for result in results:
        factors = torch.linspace(-1, 2, len(result), dtype=result.dtype)
        loss = loss + torch.where(result.isneginf(), 0.0, result * factors).sum()
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, (x, y)))


def found(
    x: Tensor, y: Tensor, row_keys: list[int], column_keys: list[int], product: torch.dtype | None, small: bool = True
) -> list[Tensor]:
    """Results of the kernels for fp32 rows, in blocks of 16, of few rows and columns a launch."""
    from vlm.similarity.triton import launch

    blocks = launch.Blocks(16, 16, 16, warps=4, stages=1)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(launch, "_BLOCKS", {torch.float32: blocks, torch.bfloat16: blocks})
            patch.setattr(launch, "_ROW_BLOCKS", 2)
            patch.setattr(launch, "_PROGRAMS", 4)
            patch.setattr(launch, "_TILE_ROWS", 24)
            patch.setattr(launch, "_TILE_COLUMNS", 40)
        x, y = x.float().requires_grad_(), y.float().requires_grad_()
        x_keys, y_keys = (torch.tensor(keys) if keys else None for keys in (row_keys, column_keys))
        return with_gradients(launch.fused_log_sum_exp(x, y, x_keys, y_keys, product), x, y)


def assert_equals_loop(
    run: Run,
    x: Tensor,
    y: Tensor,
    row_keys: list[int],
    column_keys: list[int],
    product: torch.dtype | None = None,
    small: bool = True,
) -> None:
    rounded_x, rounded_y = (some.to(product or torch.float32).double().requires_grad_() for some in (x, y))
    expected = with_gradients(written_out(rounded_x, rounded_y, row_keys, column_keys), rounded_x, rounded_y)
    results = run(found, x, y, row_keys, column_keys, product, small)
    # Logits are never rounded to bf16; the gradients' factors and sums are.
    for index, (one, other) in enumerate(zip(results, expected, strict=True)):
        assert one.dtype == torch.float32
        lines = other.isfinite()
        assert torch.equal(one.isfinite(), lines)
        distance = (one[lines] - other[lines]).norm() / other[lines].norm().clamp(min=1e-3)
        assert distance < (1e-2 if product and index > 1 else 2e-5), index


KEYS = ([i % 7 for i in range(37)], [i % 11 for i in range(53)])


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("keys", [([], []), KEYS])
@pytest.mark.parametrize("product", [None, torch.bfloat16])
def test_sums_and_gradients_equal_a_double_loop_at_ragged_sizes(
    interpreter: Run, scale: float, keys: tuple[list[int], list[int]], product: torch.dtype | None
) -> None:
    assert_equals_loop(interpreter, scale * unit_rows(37, 21, 0), unit_rows(53, 21, 1), *keys, product)


@pytest.mark.parametrize("product", [None, torch.bfloat16])
def test_one_block_larger_than_the_matrix_gives_the_same(interpreter: Run, product: torch.dtype | None) -> None:
    assert_equals_loop(interpreter, 14 * unit_rows(37, 21, 0), unit_rows(53, 21, 1), *KEYS, product, False)


def test_near_duplicates_at_the_highest_scale_stay_finite_and_right(interpreter: Run) -> None:
    y = unit_rows(40, 16, 3)
    x = 100 * (y + 1e-4 * unit_rows(40, 16, 4))
    assert_equals_loop(interpreter, x, y, list(range(40)), list(range(40)))
    assert_equals_loop(interpreter, x, x / 100, [], [])


def test_lines_without_entries_are_minus_infinity_and_pass_no_gradient(interpreter: Run) -> None:
    x, y = 14 * unit_rows(20, 8, 5), unit_rows(18, 8, 6)
    assert_equals_loop(interpreter, x, y, [0] * 19 + [1], [0] * 18)
    row, column, d_x, d_y = interpreter(found, x, y, [0] * 20, [0] * 18, None)
    assert row.isneginf().all()
    assert column.isneginf().all()
    assert not d_x.any()
    assert not d_y.any()


def twice(x: Tensor, y: Tensor) -> bool:
    return all(torch.equal(*both) for both in zip(*(found(x, y, *KEYS, None) for _ in range(2)), strict=True))


def test_two_runs_give_the_same_bits(interpreter: Run) -> None:
    assert interpreter(twice, 14 * unit_rows(37, 21, 0), unit_rows(53, 21, 1))


def plain(
    rows: Tensor, columns: Tensor, row_keys: Tensor | None, column_keys: Tensor | None, product: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    assert row_keys is not None
    assert column_keys is not None
    logits = (rows @ columns.T).masked_fill(row_keys[:, None] == column_keys, -math.inf)
    return logits.logsumexp(1), logits.logsumexp(0)


def slow(*args: Any) -> tuple[Tensor, Tensor]:
    time.sleep(2)
    return plain(*args)


def other(*args: Any) -> tuple[Tensor, Tensor]:
    row, column = plain(*args)
    return row * 1.01, column


def chosen(reference: Run, block_rows: int = 16) -> tuple[list[str | None], list[str]]:
    """Which reduction two calls get beside `reference`, and what they warned of."""
    from vlm.similarity.triton import launch

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        patch.setattr(dispatch, "_LEAST_ENTRIES", 0)
        patch.setattr(dispatch, "_TRIAL_ROWS", 20)
        patch.setattr(dispatch, "_TRIAL_COLUMNS", 24)
        patch.setattr(dispatch, "_REPEATS", 1)
        patch.setattr(dispatch, "_chosen", {})
        patch.setattr(launch, "_BLOCKS", {torch.float32: launch.Blocks(block_rows, 16, 16, warps=4, stages=1)})
        state = torch.get_rng_state()
        found = [dispatch.fused_reduction(torch.ones(3, 8), 5, None, reference) for _ in range(2)]
        assert torch.equal(state, torch.get_rng_state())
    return [one and getattr(one, "__name__", "") for one in found], [str(notice.message) for notice in notices]


def test_the_faster_of_two_that_agree_is_kept_without_a_word(interpreter: Run) -> None:
    assert interpreter(chosen, slow) == (["fused_log_sum_exp"] * 2, [])
    assert interpreter(chosen, plain) == ([None, None], [])


def test_a_kernel_that_triton_refuses_gives_way_with_one_notice(interpreter: Run) -> None:
    kept, (notice,) = interpreter(chosen, slow, 3)  # a block's extent has to be a power of two
    assert kept == [None, None]
    assert notice.startswith("fused kernels are not used on cpu (InterpreterError")
    assert "power of 2" in notice
    assert "\n" not in notice


def test_kernels_that_disagree_give_way_with_one_notice(interpreter: Run) -> None:
    kept, (notice,) = interpreter(chosen, other)
    assert kept == [None, None]
    assert "results off by 0.0099" in notice


def test_other_devices_types_and_small_problems_stay_plain_and_never_import_triton() -> None:
    program = """
import sys, torch
from vlm.similarity.triton import dispatch
def plain(*args): raise AssertionError
for rows in (torch.ones(2000, 8), torch.ones(2000, 8, dtype=torch.float64)):
    assert dispatch.fused_reduction(rows, 2000, None, plain) is None
assert "triton" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_only_equal_keys_alone_and_the_same_for_both_directions_are_taken() -> None:
    keys = EqualKeys(torch.arange(3), torch.arange(4))
    found = dispatch.common_keys((keys,))
    assert found is not None
    assert found[0] is keys.row_keys
    assert found[1] is keys.column_keys
    assert dispatch.common_keys((keys,), (keys,)) == found
    assert dispatch.common_keys(()) == (None, None)
    kept = EqualKeys(torch.arange(3), torch.arange(4), keep=True)
    for weights in (((keys, keys),), ((kept,),), ((AtLeast(torch.zeros(3)),),), ((keys,), ()), ((), (keys,))):
        assert dispatch.common_keys(*weights) is None


def through_log_sum_exp(num_rows: int, with_keys: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Results and gradients of `log_sum_exp`, fused and plain, and how often the fused path ran."""
    from vlm.similarity import log_sum_exp
    from vlm.similarity.triton import launch

    calls = 0

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return launch.fused_log_sum_exp(*args)

    def run() -> list[Tensor]:
        x, y = (unit_rows(count, 21, count).float().requires_grad_() for count in (num_rows, 53))
        scale = torch.tensor([14.0], requires_grad=True)
        weights = (EqualKeys(torch.arange(num_rows) % 7, torch.arange(53) % 11),) if with_keys else ()
        row, column = log_sum_exp.log_sum_exp(x, Columns(y), scale, weights)
        loss = row.sum() + (column * torch.linspace(-1, 2, 53)).sum()
        return [row.detach(), column.detach(), *torch.autograd.grad(loss, (x, y, scale))]

    expected = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_LEAST_ENTRIES", 37 * 53)
        patch.setattr(dispatch, "_chosen", {(torch.device("cpu"), torch.float32, torch.float32, 21): counted})
        return run(), expected, calls


@pytest.mark.parametrize("with_keys", [False, True])
def test_log_sum_exp_takes_the_fused_path_where_it_was_chosen(interpreter: Run, with_keys: bool) -> None:
    results, expected, calls = interpreter(through_log_sum_exp, 37, with_keys)
    assert calls == 1
    for one, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    assert interpreter(through_log_sum_exp, 36, with_keys)[2] == 0  # too few entries


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("capability", "shared_kib", "factors"), [(80, 163, torch.float32), (90, 227, torch.bfloat16)])
@pytest.mark.parametrize("kernel", ["reduce_kernel", "derivative_kernel"])
def test_kernels_compile_for_gpus_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, shared_kib: int, factors: torch.dtype, kernel: str
) -> None:
    """Products of bf16 on tensor cores, of fp32 in full precision; shared memory within a streaming processor's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(kernel, capability, factors)
    assembly = code.asm["ptx"]
    assert ("mma" in assembly) == (factors == torch.bfloat16)
    assert "tf32" not in assembly
    assert code.metadata.shared <= shared_kib * 1024


def compiled(kernel: str, capability: int, factors: torch.dtype) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlm.similarity.triton import kernels, launch

    function, blocks = getattr(kernels, kernel), launch._BLOCKS[factors]
    constants = {
        "keyed": True,
        "widen": False,
        "block_rows": blocks.rows,
        "block_columns": blocks.columns,
        "block_dim": blocks.dim,
    }
    types = dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("x", "y", "tile"), "*fp32" if factors == torch.float32 else "*bf16")
    types |= dict.fromkeys(("row_keys", "column_keys"), "*i64")
    types |= dict.fromkeys(("num_rows", "num_columns", "dim", "span"), "i32")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
