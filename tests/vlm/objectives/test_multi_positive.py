"""InfoNCE with several positives: both forms equal their definition at any world size, however positives are found."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by, assert_same, on_ranks, unit
from vlm.errors import UserError
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import pair_up
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.recipe import Terms
from vlm.objectives.terms.multi_positive import multi_positive

FORMS = ["log_sum", "mean_log"]
FEW = Setting({}, captions=(0, 1, 2, 3, 0, 5, 6, 7, 1, 0, 10))
ONE_GROUP = (4,) * 11


def row_loss(form: str, logits: Tensor, positive: Tensor) -> Tensor:
    if form == "log_sum":
        return torch.logsumexp(logits, 0) - torch.logsumexp(logits[positive], 0)
    return (torch.logsumexp(logits, 0) - logits[positive]).mean()


def written_out(whole: Whole, form: str, keys: Tensor) -> Tensor:
    """The definition, row by row; other rows of a row's own sample are compared with it only when its key is theirs."""
    total = torch.zeros((), dtype=torch.float64)
    count = len(keys)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        for i in range(count):
            kept = [j for j in range(count) if keys[j] == keys[i] or whole.ids[j] != whole.ids[i]]
            logits = torch.stack([whole.scale[0] * rows[i] @ columns[j] for j in kept])
            total = total + row_loss(form, logits, keys[kept] == keys[i])
    return total / (2 * count)


def written_out_over_captions(whole: Whole, form: str, keys: Tensor) -> Tensor:
    """Images against all captions and captions against all images; the means of both sides, halved."""
    caption_keys = keys[whole.caption_rows]
    logits = whole.scale[0] * torch.stack([whole.all_captions @ image for image in whole.image])
    image_losses = [row_loss(form, logits[i], caption_keys == keys[i]) for i in range(len(keys))]
    caption_losses = [row_loss(form, logits[:, m], keys == caption_keys[m]) for m in range(len(caption_keys))]
    return (torch.stack(image_losses).mean() + torch.stack(caption_losses).mean()) / 2


def term(**options: Any) -> dict[str, Any]:
    return {"multi_positive": options}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", [{}, {"exchange": "ring"}])
def test_equal_captions_are_positives_over_all_ranks(form: str, similarity: dict[str, Any]) -> None:
    setting = replace(FEW, terms=term(form=form), similarity=similarity)
    assert_defined_by(setting, lambda whole: written_out(whole, form, whole.captions))


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_a_few_classes_are_positives_over_all_ranks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many positives a row they are found tile by tile; with the limit at 0, on one process, all of them are."""
    setting = Setting(term(form=form, by="label"))
    definition = lambda whole: written_out(whole, form, whole.labels)  # noqa: E731
    assert_defined_by(setting, definition)
    monkeypatch.setattr("vlm.similarity.entry_weights._FEW", 0)
    assert_defined_by(setting, definition, (1,))


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_that_is_twice_in_the_batch_is_never_its_own_negative(form: str) -> None:
    ids = (7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3)
    for by in ("sample", "caption"):
        setting = replace(FEW, terms=term(form=form, by=by), ids=ids)
        assert_defined_by(
            setting,
            lambda whole, by=by: written_out(whole, form, whole.ids if by == "sample" else whole.captions),  # type: ignore[misc]
            (3,),
        )


def test_without_equal_keys_both_forms_are_clip() -> None:
    plain = on_ranks(Setting({"clip": 1.0}), 1)
    for form in FORMS:
        assert_same(on_ranks(Setting(term(form=form, by="sample")), 1), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["sample", "label"])
@pytest.mark.parametrize("similarity", [{}, {"exchange": "ring"}])
def test_all_captions_of_an_image_are_its_positives(form: str, by: str, similarity: dict[str, Any]) -> None:
    setting = Setting(term(form=form, by=by, captions="all"), similarity=similarity, several_captions=True)
    definition = lambda whole: written_out_over_captions(  # noqa: E731
        whole, form, whole.ids if by == "sample" else whole.labels
    )
    assert_defined_by(setting, definition, (1, 3) if not similarity else (3,))


def test_one_group_for_all_has_no_log_sum_loss() -> None:
    for options in ({}, {"captions": "all"}):
        setting = Setting(term(by="label", **options), labels=ONE_GROUP, several_captions=bool(options))
        found = on_ranks(setting, 1)
        assert all(not tensor.any() for tensor in found.values())


def test_the_log_sum_is_never_above_the_mean_of_logs() -> None:
    for labels in ((0, 1, 2, 0, 1, 2, 0, 3, 3, 1, 4), ONE_GROUP, tuple(range(11))):
        values = [on_ranks(Setting(term(form=form, by="label"), labels=labels), 1)["value"] for form in FORMS]
        assert values[0] <= values[1] + 1e-12


def objective_of(**options: Any) -> Objective:
    return Objective(TypeAdapter(Terms).validate_python(term(**options)))


def fixture_value(labels: tuple[int, int]) -> dict[str, float]:
    """Similarities [[0.9, 0.1], [0.2, 0.8]] at a temperature of 0.5."""
    outputs = outputs_of(
        torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        torch.tensor([2.0], dtype=torch.float64),
    )
    batch = batch_of(2, labels=torch.tensor(labels))
    return {form: objective_of(form=form, by="label").evaluate(outputs, batch)[0].item() for form in FORMS}


def test_the_two_by_two_fixture() -> None:
    """Two groups: clip's 0.223592 and 0.220417, halved; one group: 0, and the mean of clip's own and crossed logs."""
    apart, together = fixture_value((0, 1)), fixture_value((5, 5))
    for form in FORMS:
        assert apart[form] == pytest.approx(0.222005, abs=1e-6)
    assert together["log_sum"] == 0
    # Crossing a row costs half the difference of its logits: (1.6 + 1.2) / 2 of rows, (1.4 + 1.4) / 2 of columns.
    assert together["mean_log"] == pytest.approx(0.222005 + (1.6 + 1.2 + 1.4 + 1.4) / 8, abs=1e-6)


def test_aligned_pairs_keep_their_digits_in_single_precision() -> None:
    """The loss of perfectly aligned pairs is log(1 + 11 exp(-10)): 5e-4, from numbers that are near 10."""
    expected = math.log1p(11 * math.exp(-10))
    outputs = outputs_of(torch.eye(12), torch.eye(12), torch.tensor([10.0]))
    for form in FORMS:
        objective = objective_of(form=form, by="label")
        found = objective.evaluate(outputs, batch_of(12, labels=torch.arange(12)))[0].item()
        assert found == pytest.approx(expected, rel=2e-6)


def test_all_captions_are_asked_for_and_missed() -> None:
    assert "captions" in objective_of(captions="all").needs.outputs
    assert "captions" not in objective_of().needs.outputs
    with pytest.raises(UserError, match=r"objective\.multi_positive: .*captions.*data\.caption"):
        on_ranks(Setting(term(captions="all")), 1)


def test_what_providers_add_is_of_pairs_alone() -> None:
    terms = objective_of(captions="all").pair_terms, objective_of().pair_terms
    assert [found["multi_positive"].takes_providers for found in terms] == [False, True]


@pytest.mark.parametrize("form", FORMS)
def test_extra_negatives_join_the_denominators_and_a_spread_moves_the_own_pair_alone(form: str) -> None:
    x, y, more_images, more_texts = (
        unit(torch.randn(4, 3, generator=torch.Generator().manual_seed(k))) for k in range(4)
    )
    labels, spread = torch.tensor([0, 1, 0, 2]), torch.tensor([1.5, 1.0, 2.0, 1.2])
    pairs = pair_up(x, y)
    extra = SharedNegatives(pairs, {"image": more_images, "text": more_texts}, (torch.arange(10, 14),))
    pairs = replace(pairs, extra=(extra,), positive_spread=spread)
    found = multi_positive(pairs, torch.tensor([5.0]), labels, form=form)  # type: ignore[arg-type]
    similarities = x @ y.T
    own = similarities.diagonal().clone()
    similarities.fill_diagonal_(0.0)
    similarities += torch.diag((2 * spread**2 - 2 * spread + 1) * own + 2 * spread * (1 - spread))
    image_logits = 5 * torch.cat([similarities, x @ more_texts.T], 1)
    text_logits = 5 * torch.cat([similarities.T, y @ more_images.T], 1)
    padded = torch.cat([labels, torch.full((4,), -1)])
    losses = [
        row_loss(form, logits[i], padded == labels[i]) for logits in (image_logits, text_logits) for i in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
