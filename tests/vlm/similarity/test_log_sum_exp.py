"""Log-sum-exp by tiles against a float64 double loop: values, gradients, every way to leave entries out, memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vlm.similarity.double_loop import Problem, defined, gradients, problem
from vlm.similarity import tiles
from vlm.similarity.entry_weights import AtLeast, EntryWeights, EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp, row_log_sum_exp
from vlm.similarity.softplus_sum import softplus_sum
from vlm.similarity.tiles import Columns

ROWS, COLUMNS = 17, 25
IN_RANGE, RUNNING = 5.0, 100.0

Weights = tuple[EntryWeights, ...]


@pytest.fixture(name="ragged")
def ragged_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles down and four across, the last ones smaller."""
    monkeypatch.setattr(tiles, "_TILE_ROWS", 7)
    monkeypatch.setattr(tiles, "_TILE_COLUMNS", 8)


def one_scale(of: Problem) -> Problem:
    """The same with a common scale."""
    number = of.row_scale[0]
    return replace(of, row_scale=number.expand(ROWS).clone(), column_scale=number.expand(COLUMNS).clone())


def keys(kind: str) -> tuple[Tensor, Tensor]:
    """Keys of rows and columns: each column's own (`few` are equal), or of three classes (`many` are)."""
    if kind == "few":
        return torch.arange(ROWS) % 15 + 4, torch.arange(COLUMNS)  # rows 0 and 15, 1 and 16 share one
    return torch.arange(ROWS) % 3, torch.arange(COLUMNS) % 4 % 3


def with_entries(name: str, of: Problem) -> tuple[Weights, Weights, Problem]:
    """Row weights, column weights, and the problem with what they leave, found by loops."""
    if name == "all":
        return (), (), of
    if name == "at least":
        logits = of.row_scale[0] * of.rows @ of.columns.T
        least_of_row, least_of_column = logits.quantile(0.47, 1), logits.quantile(0.77, 0)  # between two entries
        counts = [
            torch.tensor([[bool(logits[i, j] >= least(i, j)) for j in range(COLUMNS)] for i in range(ROWS)])
            for least in (lambda i, _: least_of_row[i], lambda _, j: least_of_column[j])
        ]
        weights = AtLeast(least_of_row), AtLeast(least_of_column, by_column=True)
        return (weights[0],), (weights[1],), replace(of, row_counts=counts[0], column_counts=counts[1])
    keep, kind = name.startswith("only"), name.split()[-1]
    row_keys, column_keys = keys(kind)
    equal = torch.tensor([[bool(row_keys[i] == column_keys[j]) for j in range(COLUMNS)] for i in range(ROWS)])
    counts_of_both = equal if keep else ~equal
    both = (EqualKeys(row_keys, column_keys, keep=keep),)
    assert (both[0].listed is None) == (kind == "many")
    return both, both, replace(of, row_counts=counts_of_both, column_counts=counts_of_both)


ENTRIES = ["all", "not few", "not many", "only few", "only many"]


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("scale", [IN_RANGE, RUNNING])
@pytest.mark.parametrize("entries", [*ENTRIES, "at least"])
def test_rows_and_columns_at_once_with_one_scale(entries: str, scale: float) -> None:
    row_weights, column_weights, of = with_entries(entries, one_scale(problem(ROWS, COLUMNS, scale)))
    expected, expected_gradients = defined(of)
    rows, columns, _, _ = of.leaves()
    number = of.row_scale[:1].clone().requires_grad_()
    given = None if row_weights is column_weights else column_weights
    results = log_sum_exp(rows, Columns(columns), number, row_weights, given)
    assert_close(results, expected)
    found = gradients(results, (rows, columns, number))
    assert_close(found[:2], expected_gradients[:2])
    assert_close(found[2:], (expected_gradients[2].sum()[None] + expected_gradients[3].sum(),))


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("scale", [IN_RANGE, RUNNING])
@pytest.mark.parametrize("entries", ENTRIES)
def test_rows_alone_with_a_scale_a_row(entries: str, scale: float) -> None:
    weights, _, of = with_entries(entries, problem(ROWS, COLUMNS, scale))
    expected, _ = defined(of)
    rows, columns, row_scale, _ = leaves = of.leaves()
    result = row_log_sum_exp(rows, Columns(columns), row_scale, weights)
    assert_close((result,), expected[:1])
    nothing = replace(of, column_counts=torch.zeros_like(of.column_counts))
    assert_close(gradients((result,), leaves[:3]), defined(nothing)[1][:3])


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("scale", [IN_RANGE, RUNNING])
def test_lines_without_any_entry_are_minus_infinity_and_have_no_gradient(scale: float) -> None:
    rows, columns, number, _ = problem(ROWS, COLUMNS, scale).leaves()
    row_keys, column_keys = torch.full((ROWS,), -1), torch.full((COLUMNS,), -2)
    row_keys[2], column_keys[9] = 0, 0
    results = log_sum_exp(rows, Columns(columns), number[:1], (EqualKeys(row_keys, column_keys, keep=True),))
    for result, only in zip(results, (2, 9), strict=True):
        assert result.isfinite().nonzero().flatten().tolist() == [only]
        assert result[torch.arange(len(result)) != only].isneginf().all()
    d_rows, d_columns, d_scale = gradients(results, (rows, columns, number))
    assert d_rows.norm(dim=1).nonzero().flatten().tolist() == [2]
    assert d_columns.norm(dim=1).nonzero().flatten().tolist() == [9]
    assert d_scale.isfinite().all()


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize(("worst", "rounds"), [(0.5, 1), (-0.1, 1), (-0.3, 2), (-0.99, 2)])
@pytest.mark.parametrize(("scaled", "line"), [("one", "row"), ("one", "column"), ("rows", "row")])
def test_a_line_whose_logits_are_all_small_keeps_its_digits_in_fp32(
    scaled: str, line: str, worst: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a scale of 100, one row or one column has the cosine `worst` with all others, down to exp(-99).

    One reference for all is enough while they are not too far from the rest; then all tiles are summed again.
    """
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return tiles.reduce_tiles(*arguments, **options)

    monkeypatch.setattr("vlm.similarity.log_sum_exp.reduce_tiles", counted)
    rows, columns = (normalize(torch.randn(count, 8), dim=1) for count in (ROWS, COLUMNS))
    alone, others = (rows, columns) if line == "row" else (columns, rows)
    alone[3] = torch.eye(8)[0]
    others[:, 0] = 0
    others *= math.sqrt(1 - worst**2) / others.norm(dim=1, keepdim=True)
    others[:, 0] = worst
    leaves = [rows.requires_grad_(), columns.requires_grad_()]
    logits = 100 * rows.double() @ columns.double().T
    expected = logits.logsumexp(1), logits.logsumexp(0)
    found: tuple[Tensor, ...]
    if scaled == "one":
        found = log_sum_exp(rows, Columns(columns), torch.tensor([100.0]))
    else:
        found = (row_log_sum_exp(rows, Columns(columns), torch.full((ROWS,), 100.0)),)
    assert len(calls) == rounds
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-5)
    wanted = torch.autograd.grad(torch.cat(expected[: len(found)]).sum(), leaves)
    got = torch.autograd.grad(torch.cat(found).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-2)


def test_no_rows_and_no_columns() -> None:
    some, none = torch.randn(3, 4), torch.randn(0, 4)
    scale = torch.ones(1)
    row, column = log_sum_exp(none, Columns(some), scale)
    assert row.shape == (0,)
    assert column.isneginf().all()
    row, column = log_sum_exp(some, Columns(none), scale)
    assert row.isneginf().all()
    assert column.shape == (0,)


@pytest.mark.parametrize("largest", [39.999, 40.001, 100.0, 119.999, 120.001, 500.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_both_sides_of_the_limits_up_to_which_no_reference_or_one_for_all_is_kept(largest: float, sign: float) -> None:
    """3000 equal logits, the largest or the smallest there can be: L + log 3000, and a gradient of 1/3000 each."""
    rows, columns = torch.zeros(40, 4), torch.zeros(3000, 4)
    rows[:, 0], columns[:, 0] = 1.0, sign
    scale = torch.tensor([largest], requires_grad=True)
    columns.requires_grad_()
    row, column = log_sum_exp(rows, Columns(columns), scale)
    torch.testing.assert_close(row, torch.full_like(row, sign * largest + math.log(3000)), rtol=1e-6, atol=0)
    torch.testing.assert_close(column, torch.full_like(column, sign * largest + math.log(40)), rtol=1e-6, atol=0)
    d_columns, d_scale = torch.autograd.grad(row.sum(), (columns, scale))
    assert d_columns[:, 0] == pytest.approx(torch.full((3000,), 40 * largest / 3000), rel=1e-4)
    assert d_scale.item() == pytest.approx(40 * sign, rel=1e-4)


def test_a_bf16_product_rounds_factors_and_the_distance_from_what_weighs_most() -> None:
    """All logits lie within 1 of 100, where bf16 has steps of 0.5: what the rounding of factors leaves is kept."""
    generator = torch.Generator().manual_seed(0)
    one, more, others = (torch.randn(size, 64, generator=generator) for size in (1, 30, 40))
    rows, columns = normalize(one + 0.05 * more, dim=1), normalize(one + 0.05 * others, dim=1)
    scale = torch.tensor([100.0])
    rounded = (rows * scale).bfloat16().double() @ columns.bfloat16().double().T
    results = log_sum_exp(rows, Columns(columns), scale, matmul_dtype=torch.bfloat16)
    assert rounded.max() - rounded.min() < 1
    for dim, result in zip((1, 0), results, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), rounded.logsumexp(dim), rtol=0, atol=1e-3)


def test_a_bf16_product_is_near_the_exact_one_at_the_usual_scale() -> None:
    of = one_scale(problem(ROWS, COLUMNS, 14.3, dim=64))
    results = log_sum_exp(
        of.rows.float(), Columns(of.columns.float()), of.row_scale[:1].float(), matmul_dtype=torch.bfloat16
    )
    for dim, result in zip((1, 0), results, strict=True):
        exact = torch.logsumexp(of.row_scale[0] * of.rows @ of.columns.T, dim)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_statistics_are_in_at_least_fp32_under_autocast_too(dtype: torch.dtype, statistics: torch.dtype) -> None:
    rows, columns = torch.randn(9, 4).to(dtype), torch.randn(11, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = log_sum_exp(rows, Columns(columns), torch.ones(1, dtype=dtype))
    assert {result.dtype for result in results} == {statistics}
    exact = torch.logsumexp(rows.double() @ columns.double().T, 1)
    torch.testing.assert_close(results[0].double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else (result,)
        sizes = [some.untyped_storage().nbytes() // some.element_size() for some in made if isinstance(some, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Weights], tuple[Tensor, ...]]] = {
    "log_sum_exp": lambda x, y, a, weights: log_sum_exp(x, Columns(y), a, weights),
    "row_log_sum_exp": lambda x, y, a, weights: (row_log_sum_exp(x, Columns(y), a, weights),),
    "softplus_sum": lambda x, y, a, weights: (softplus_sum(x, Columns(y), a, -a, weights),),
}


@pytest.mark.parametrize("num_keys", [3000, 10])
@pytest.mark.parametrize("scale", [IN_RANGE, RUNNING])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_tensor_of_rows_times_columns_is_ever_made(
    name: str, scale: float, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_TILE_ROWS", 256)
    monkeypatch.setattr(tiles, "_TILE_COLUMNS", 256)
    x, y = (normalize(torch.randn(3000, 16), dim=1).requires_grad_() for _ in range(2))
    labels = torch.arange(3000) % num_keys
    number = torch.tensor([scale], requires_grad=True)
    with Largest() as largest:
        results = REDUCTIONS[name](x, y, number, (EqualKeys(labels, labels),))
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert largest.numel <= 256 * 256
    assert largest.numel >= 3000 * 16  # the mode sees both passes


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
