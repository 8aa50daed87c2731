"""The continuously weighted loss equals its definition at any world size, for each source and direction of weights."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by, assert_same, on_ranks, unit
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import pair_up
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.terms.clip import Clip
from vlm.objectives.terms.continuous import Continuous, continuous


def one_way(rows: Tensor, columns: Tensor, scale: Tensor, ids: Tensor, weights: list[list[float]] | None) -> Tensor:
    """The weighted mean of cross-entropies, row by row; without weights the pair's own alone."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        kept = [j for j in range(len(columns)) if j == i or ids[j] != ids[i]]
        logits = torch.stack([scale * rows[i] @ columns[j] for j in kept])
        losses = torch.logsumexp(logits, 0) - logits
        w = torch.tensor([float(j == i) if weights is None else weights[i][j] for j in kept], dtype=torch.float64)
        total = total + (w @ losses) / w.sum()
    return total / len(rows)


def written_out(whole: Whole, direction: str, source: str, sharpness: float = 1.0, threshold: float = 0.0) -> Tensor:
    q = getattr(whole, source).detach()
    count = len(q)
    w = [[((float(q[i] @ q[j]) + 1) / 2) ** sharpness for j in range(count)] for i in range(count)]
    w = [[1.0 if i == j else w[i][j] * (w[i][j] >= threshold) for j in range(count)] for i in range(count)]
    image_loss = one_way(
        whole.image, whole.text, whole.scale[0], whole.ids, w if direction != "text_to_image" else None
    )
    text_loss = one_way(whole.text, whole.image, whole.scale[0], whole.ids, w if direction != "image_to_text" else None)
    return (image_loss + text_loss) / 2


def setting_of(**options: Any) -> Setting:
    return Setting({"continuous": options})


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text", "both"])
@pytest.mark.parametrize("source", ["image", "teacher_text"])
def test_value_and_averaged_gradients_equal_the_definition_on_the_whole_batch(direction: str, source: str) -> None:
    assert_defined_by(
        setting_of(direction=direction, weights_from=source), lambda whole: written_out(whole, direction, source)
    )


@pytest.mark.parametrize("source", ["text", "teacher_image"])
def test_sharpened_and_cut_weights_in_a_ring(source: str) -> None:
    setting = replace(
        setting_of(direction="both", weights_from=source, sharpness=2.5, threshold=0.3), similarity={"exchange": "ring"}
    )
    assert_defined_by(setting, lambda whole: written_out(whole, "both", source, 2.5, 0.3), (3,))


def test_a_sample_that_is_twice_in_the_batch_is_not_compared_with_itself() -> None:
    setting = replace(setting_of(), ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
    assert_defined_by(setting, lambda whole: written_out(whole, "text_to_image", "image"))


def test_rows_that_are_opposite_to_the_last_bit_and_beyond_weigh_nothing() -> None:
    """Rounding may leave rows a little longer than 1, and so a similarity below -1, which has no square root."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(200, 7, generator=generator), dim=1)
    long = drawn[(drawn * drawn).sum(1) > 1][0]
    assert -long @ long < -1
    image = torch.stack([long, -long])
    outputs = outputs_of(image, image.flip(1), torch.tensor([2.0]))
    halves = [Continuous(sharpness=0.5, direction=way) for way in ("text_to_image", "both")]
    for term in halves:
        value, _ = Objective({"continuous": term}).evaluate(outputs, batch_of(2))
        plain, _ = Objective({"clip": Clip()}).evaluate(outputs, batch_of(2))
        assert value.item() == pytest.approx(plain.item(), rel=1e-6)  # only the own pairs weigh


def value_of(image: Tensor, text: Tensor, q: Tensor, scale: float, **options: Any) -> float:
    """The term with weights from a teacher's images q."""
    objective = Objective({"continuous": Continuous(weights_from="teacher_image", **options)})
    outputs, teacher = outputs_of(image, text, image.new_tensor([scale])), outputs_of(q, q, image.new_ones(1))
    return objective.evaluate(outputs, batch_of(len(image)), teacher=teacher)[0].item()


# Similarities [[0.9, 0.1], [0.2, 0.8]] at a temperature of 0.5: cross-entropies 0.223592 and 0.220417 of the two ways.
SIMILARITIES, EYE = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(("options", "weighted"), [({}, 0.690258), ({"threshold": 1.0}, 0.223592)])
def test_the_two_by_two_fixture(options: dict[str, float], weighted: float) -> None:
    """Orthogonal q weigh [[1, 0.5], [0.5, 1]]; a threshold of 1 leaves the identity."""
    value = value_of(SIMILARITIES, EYE, EYE, 2.0, direction="image_to_text", **options)
    assert value == pytest.approx((weighted + 0.220417) / 2, abs=1e-6)
    other_way = value_of(EYE, SIMILARITIES, EYE, 2.0, direction="text_to_image", **options)
    assert other_way == pytest.approx((weighted + 0.220417) / 2, abs=1e-6)


def test_equal_weights_want_equal_logits_and_cost_the_log_of_the_batch() -> None:
    alike, apart = torch.ones(5, 4, dtype=torch.float64) / 2, torch.eye(5, 6, dtype=torch.float64)
    same = torch.ones(5, 3, dtype=torch.float64) / math.sqrt(3)
    assert value_of(alike, alike, same, 10.0, direction="both") == pytest.approx(math.log(5), abs=1e-12)
    assert value_of(apart, apart, same, 10.0, direction="both") > math.log(5) + 1


def test_the_weights_do_not_change_when_their_embeddings_are_rotated() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, q = (
        torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64, generator=generator)) for _ in range(3)
    )
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
    assert value_of(x, y, q @ rotation, 5.0) == pytest.approx(value_of(x, y, q, 5.0), rel=1e-12)


def test_no_power_at_all_weighs_all_pairs_alike() -> None:
    same = torch.ones(2, 2, dtype=torch.float64) / math.sqrt(2)
    assert value_of(SIMILARITIES, EYE, EYE, 2.0, sharpness=0.0) == pytest.approx(
        value_of(SIMILARITIES, EYE, same, 2.0), rel=1e-12
    )


def test_an_averaged_model_is_needed_only_for_its_weights() -> None:
    for source, outputs in {"image": set(), "text": set(), "teacher_text": {"text"}}.items():
        assert Continuous.model_validate({"weights_from": source}).needs().teacher_outputs == outputs


def test_a_threshold_of_one_is_clip() -> None:
    assert_same(on_ranks(setting_of(threshold=1.0), 3), on_ranks(Setting({"clip": 1.0}), 3))


def test_extra_negatives_join_the_denominators_and_a_spread_moves_the_own_pair_alone() -> None:
    x, y, more_images, more_texts = (
        unit(torch.randn(4, 3, generator=torch.Generator().manual_seed(k))) for k in range(4)
    )
    spread = torch.tensor([1.5, 1.0, 2.0, 1.2])
    pairs = pair_up(x, y)
    extra = SharedNegatives(pairs, {"image": more_images, "text": more_texts}, (torch.arange(10, 14),))
    pairs = replace(pairs, extra=(extra,), positive_spread=spread)
    found = continuous(pairs, torch.tensor([5.0]), x, direction="both")
    similarities = x @ y.T
    own = similarities.diagonal().clone()
    similarities.fill_diagonal_(0.0)
    similarities += torch.diag((2 * spread**2 - 2 * spread + 1) * own + 2 * spread * (1 - spread))
    w = ((x @ x.T + 1) / 2).fill_diagonal_(1.0)
    w = torch.cat([w / w.sum(1, keepdim=True), torch.zeros(4, 4)], 1)
    losses = [
        -(w * torch.log_softmax(5 * torch.cat([near, rows @ more.T], 1), 1)).sum(1)
        for near, rows, more in ((similarities, x, more_texts), (similarities.T, y, more_images))
    ]
    torch.testing.assert_close(found, torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)
