"""A term on several ranks against a definition written out on the whole batch, in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.small_blocks import small_blocks
from vlm.batch import BatchPart, Counterfactuals, DegradedImages, editor_key
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.state import RunFacts
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

N, D = 11, 6
UNEVEN: dict[int, tuple[int, ...]] = {1: (11,), 2: (7, 4), 3: (2, 5, 4), 4: (3, 1, 5, 2)}


@dataclass(frozen=True)
class Setting:
    """One objective on one fixture; plain values, so that it travels to ranks."""

    terms: dict[str, Any]
    providers: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, Any] = field(default_factory=dict)
    scale: float = 1 / 0.07
    bias: float = -10.0
    labels: tuple[int, ...] = (0, 1, 2, 0, 1, 2, 0, 3, 3, 1, 4)
    ids: tuple[int, ...] = (7, 3, 11, 5, 20, 2, 31, 8, 9, 40, 1)
    captions: tuple[int, ...] = (0, 1, 2, 3, 0, 5, 6, 7, 1, 9, 10)  # equal numbers: equal captions
    several_captions: bool = False  # row i has 1 + i % 3 captions, the first of them its text
    edited: bool = False  # row i has (i // 2) % 3 counterfactuals, and a degraded copy where i is odd and above 2
    spoiled: tuple[str, int] | None = None  # a leaf and its row that are NaN at step 0
    num_steps: int = 1  # steps evaluated and committed; the last one's value and gradients are returned


@dataclass(frozen=True)
class Whole:
    """The whole batch as a definition reads it: unit-norm rows that lead back to the leaves."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    ids: Tensor
    labels: Tensor
    captions: Tensor  # the caption's number of each row
    teacher_image: Tensor
    teacher_text: Tensor
    all_captions: Tensor  # [M, D], the captions of all rows
    caption_rows: Tensor  # [M], whose each is
    parameters: dict[str, Tensor]
    counterfactuals: Tensor  # [K, D]
    counterfactual_rows: Tensor  # [K], whose each is
    counterfactual_captions: Tensor  # [K], the number of what each reads
    editors: list[str]  # whose each is
    degraded: Tensor  # [L, D]
    degraded_rows: Tensor  # [L]
    strengths: Tensor  # [L]


COUNTERFACTUAL_ROWS = torch.tensor([row for row in range(N) for _ in range((row // 2) % 3)])
NUM_COUNTERFACTUALS = len(COUNTERFACTUAL_ROWS)
EDITORS = ["number" if place % 3 else "colour" for place in range(NUM_COUNTERFACTUALS)]
# The second reads as the caption of rows 0 and 4 does.
COUNTERFACTUAL_CAPTIONS = torch.tensor([0 if place == 1 else 100 + place for place in range(NUM_COUNTERFACTUALS)])
DEGRADED_ROWS = torch.arange(3, N, 2)
STRENGTHS = torch.linspace(0.2, 1, len(DEGRADED_ROWS))


def leaves(setting: Setting, step: int = 0) -> dict[str, Tensor]:
    """The raw rows and numbers of a step, fresh leaves. Later steps have other rows."""
    generator = torch.Generator().manual_seed(3 + step)
    names = ("image", "text", "teacher_image", "teacher_text")
    drawn = {name: torch.randn(N, D, dtype=torch.float64, generator=generator) for name in names}
    drawn["text"] = drawn["text"] + drawn["image"]  # pairs are nearer than chance
    drawn["more_captions"] = torch.randn(
        int(caption_rows(setting).numel()), D, dtype=torch.float64, generator=generator
    )
    drawn["counterfactuals"] = torch.randn(NUM_COUNTERFACTUALS, D, dtype=torch.float64, generator=generator)
    drawn["degraded"] = torch.randn(len(DEGRADED_ROWS), D, dtype=torch.float64, generator=generator)
    drawn["scale"] = torch.tensor([setting.scale], dtype=torch.float64)
    drawn["bias"] = torch.tensor([setting.bias], dtype=torch.float64)
    if setting.spoiled is not None and step == 0:
        name, row = setting.spoiled
        drawn[name][row] = torch.nan
    return {name: tensor.requires_grad_(not name.startswith("teacher")) for name, tensor in drawn.items()}


def caption_rows(setting: Setting) -> Tensor:
    """Whose each caption is."""
    return torch.tensor([row for row in range(N) for _ in range(1 + row % 3 if setting.several_captions else 1)])


def whole(setting: Setting, raw: dict[str, Tensor], parameters: dict[str, Tensor] | None = None) -> Whole:
    """The batch as a definition reads it."""
    rows = caption_rows(setting)
    text = unit(raw["text"])
    first = torch.tensor([m == 0 or rows[m] != rows[m - 1] for m in range(len(rows))])
    all_captions = torch.where(first[:, None], text[rows], unit(raw["more_captions"]))
    return Whole(
        image=unit(raw["image"]),
        text=text,
        scale=raw["scale"],
        bias=raw["bias"],
        ids=torch.tensor(setting.ids),
        labels=torch.tensor(setting.labels),
        captions=torch.tensor(setting.captions),
        teacher_image=unit(raw["teacher_image"]),
        teacher_text=unit(raw["teacher_text"]),
        all_captions=all_captions,
        caption_rows=rows,
        parameters=parameters or {},
        counterfactuals=unit(raw["counterfactuals"]),
        counterfactual_rows=COUNTERFACTUAL_ROWS,
        counterfactual_captions=COUNTERFACTUAL_CAPTIONS,
        editors=EDITORS,
        degraded=unit(raw["degraded"]),
        degraded_rows=DEGRADED_ROWS,
        strengths=STRENGTHS.double(),
    )


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


def on_this_rank(setting: Setting) -> dict[str, Tensor]:
    """The value, and the gradient that the engine's mean over ranks leaves at each leaf, as one dictionary.

    One process takes the fixture in one block; several ranks take it in blocks of two or three rows and columns.
    """
    world = World.current()
    with small_blocks() if world.size > 1 else nullcontext():
        return _on_this_rank(setting, world)


def _on_this_rank(setting: Setting, world: World) -> dict[str, Tensor]:
    counts = UNEVEN[world.size]
    first = sum(counts[: world.rank])
    rows = slice(first, first + counts[world.rank])
    exchange = Exchange(world, SimilarityConfig(**setting.similarity))
    facts = RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=world)
    objective = Objective(
        TypeAdapter(Terms).validate_python(setting.terms),
        TypeAdapter(Providers).validate_python(setting.providers),
        exchange,
        facts,
    )
    parameters = {name: value.double().requires_grad_() for name, value in objective.parameters().items()}
    for step in range(setting.num_steps):
        raw = leaves(setting, step)
        for value in parameters.values():
            value.grad = None
        share = _evaluate(objective, setting, raw, parameters, rows, step)
        share.backward()
        objective.commit()
    result = {"value": share.detach()}
    for name, leaf in {**raw, **parameters}.items():
        if leaf.requires_grad:
            result[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for tensor in result.values():
        if world.size > 1:
            dist.all_reduce(tensor)
            tensor /= world.size
    return result


def _evaluate(
    objective: Objective,
    setting: Setting,
    raw: dict[str, Tensor],
    parameters: dict[str, Tensor],
    rows: slice,
    step: int,
) -> Tensor:
    batch_of_all = whole(setting, raw)
    in_rank = (batch_of_all.caption_rows >= rows.start) & (batch_of_all.caption_rows < rows.stop)
    owners = batch_of_all.caption_rows[in_rank] - rows.start if setting.several_captions else None
    batch = batch_of(
        batch_of_all.ids[rows],
        step=step,
        tokens=batch_of_all.captions[rows, None].expand(-1, 3).contiguous(),
        labels=batch_of_all.labels[rows],
        caption_owners=owners,
    )
    edited: dict[str, Tensor] = {}
    if setting.edited:
        batch = replace(batch, parts={**batch.parts, **_edited_parts(rows)})
        edited = {
            "counterfactuals": batch_of_all.counterfactuals[_inside(COUNTERFACTUAL_ROWS, rows)],
            "degraded": batch_of_all.degraded[_inside(DEGRADED_ROWS, rows)],
        }
    outputs = edited | outputs_of(
        batch_of_all.image[rows],
        batch_of_all.text[rows],
        batch_of_all.scale,
        batch_of_all.bias,
        captions=batch_of_all.all_captions[in_rank] if setting.several_captions else None,
        parameters=parameters,
    )
    teacher = {"image": batch_of_all.teacher_image[rows].detach(), "text": batch_of_all.teacher_text[rows].detach()}
    share, _ = objective.evaluate(outputs, batch, teacher=teacher)
    return share


def _edited_parts(rows: slice) -> dict[str, BatchPart]:
    """The counterfactuals and degraded copies of a rank's rows, as parts of its batch."""
    of_captions, of_images = _inside(COUNTERFACTUAL_ROWS, rows), _inside(DEGRADED_ROWS, rows)
    tokens = COUNTERFACTUAL_CAPTIONS[of_captions, None].expand(-1, 3).contiguous()
    keys = [editor_key(name) for name, chosen in zip(EDITORS, of_captions.tolist(), strict=True) if chosen]
    owners = [
        each[chosen] - rows.start for each, chosen in ((COUNTERFACTUAL_ROWS, of_captions), (DEGRADED_ROWS, of_images))
    ]
    pixels = torch.zeros(int(of_images.sum()), 3, 1, 1, dtype=torch.uint8)
    return {
        "counterfactuals": Counterfactuals(
            tokens, torch.full((len(tokens),), 3), torch.tensor(keys, dtype=torch.int64), owners=owners[0]
        ),
        "degraded": DegradedImages(pixels, STRENGTHS[of_images], owners=owners[1]),
    }


def _inside(rows_of: Tensor, rows: slice) -> Tensor:
    inside: Tensor = (rows_of >= rows.start) & (rows_of < rows.stop)
    return inside


def on_ranks(setting: Setting, world_size: int) -> dict[str, Tensor]:
    """`on_this_rank` under `world_size` ranks with uneven rows; each rank must end with the same."""
    results = [on_this_rank(setting)] if world_size == 1 else run_ranks(on_this_rank, world_size, setting)
    for other in results[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=0, atol=0)
    first: dict[str, Tensor] = results[0]
    return first


def defined(setting: Setting, definition: Callable[[Whole], Tensor], step: int = 0) -> dict[str, Tensor]:
    """Value and gradients of a definition on the whole batch, by autograd."""
    raw = leaves(setting, step)
    value = definition(whole(setting, raw))
    value.backward()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in raw.items()
        if leaf.requires_grad
    }
    return {"value": value.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Value and all gradients of `expected` are found."""
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


def assert_defined_by(
    setting: Setting, definition: Callable[[Whole], Tensor], world_sizes: tuple[int, ...] = (1, 3)
) -> None:
    """The objective equals its definition on the whole batch, value and gradients, at each world size."""
    expected = defined(setting, definition)
    for world_size in world_sizes:
        assert_same(on_ranks(setting, world_size), expected)
