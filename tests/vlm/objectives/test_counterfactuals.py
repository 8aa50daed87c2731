"""Losses on captions that are almost right and on degraded images: closed forms, and one process on the whole batch."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by, assert_same, defined, leaves, on_ranks, whole
from vlm.batch import Batch, BatchPart, Counterfactuals, Texts, editor_key
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.objectives import functional
from vlm.objectives.objective import Objective
from vlm.objectives.providers.counterfactual_negatives import CounterfactualNegatives
from vlm.objectives.recipe import Terms
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep, pair_step
from vlm.objectives.terms.hard_negative_captions import FollowingMargin, HardNegativeCaptions
from vlm.similarity.exchange import Exchange


def edited(name: str, **options: Any) -> Setting:
    return Setting({name: options}, edited=True, scale=4.0)


def one_sample(counterfactual: Tensor | None, **options: Any) -> float:
    """The counting loss of one image at cosine 0.3 from its caption, and a counterfactual."""
    image = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    text = torch.tensor([[0.3, math.sqrt(1 - 0.09)]], dtype=torch.float64)
    made = text[:0] if counterfactual is None else counterfactual
    owners = torch.zeros(len(made), dtype=torch.int64)
    tokens, lengths = torch.zeros(len(made), 2, dtype=torch.int64), torch.full((len(made),), 2)
    parts: dict[str, BatchPart] = {
        "text": Texts(torch.ones(1, 2, dtype=torch.int64), torch.tensor([2])),
        "counterfactuals": Counterfactuals(tokens, lengths, owners + editor_key("number"), owners=owners),
    }
    outputs = {"image": image, "text": text, "counterfactuals": made, "logit_scale": torch.tensor([100.0]).double()}
    objective = Objective(TypeAdapter(Terms).validate_python({"counting": options}))
    value, _ = objective.evaluate(outputs, Batch(0, torch.tensor([5]), ("a",), parts))
    return float(value)


def at_cosine(cosine: float) -> Tensor:
    return torch.tensor([[cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("cosine", "scale", "value"),
    [
        (0.3, "none", 0.693147),
        (0.25, "none", 0.668460),
        (0.25, 100.0, 0.006715),
        (0.25, "logit_scale", 0.006715),
        (0.2, "none", 0.644397),
        (0.2, "logit_scale", 4.54e-5),
    ],
)
def test_the_values_of_the_paper(cosine: float, scale: str | float, value: float) -> None:
    assert one_sample(at_cosine(cosine), scale=scale) == pytest.approx(value, rel=1e-3, abs=5e-7)


def test_without_a_counterfactual_there_is_no_loss() -> None:
    assert one_sample(None) == 0.0


def test_it_is_a_function_of_tensors() -> None:
    image, text = torch.tensor([[1.0, 0.0]] * 2).double(), torch.cat([at_cosine(0.3), at_cosine(0.3)])
    other = torch.cat([at_cosine(0.25), at_cosine(0.2)])
    assert float(functional.counting(image, text, other)) == pytest.approx((0.668460 + 0.644397) / 2, rel=1e-5)
    assert float(functional.counting(image, text, text, scale=7.0)) == pytest.approx(math.log(2), rel=1e-12)


def by(batch: Whole, *editors: str) -> list[int]:
    return [place for place, name in enumerate(batch.editors) if name in editors]


def two_way(batch: Whole, scale: Tensor | float, places: list[int]) -> Tensor:
    """The counting loss, counterfactual by counterfactual."""
    total = batch.image.new_zeros(())
    for place in places:
        row = int(batch.counterfactual_rows[place])
        true = scale * (batch.image[row] @ batch.text[row])
        false = scale * (batch.image[row] @ batch.counterfactuals[place])
        total = total - torch.log(true.exp() / (true.exp() + false.exp()))
    return total / len(places)


def clip_among(batch: Whole, places: list[int]) -> Tensor:
    """CLIP's loss with further texts that images alone are compared with, row by row."""
    scale, total, count = batch.scale, batch.image.new_zeros(()), len(batch.image)
    for row in range(count):
        columns = [batch.text[other] for other in range(count)]
        columns += [
            batch.counterfactuals[place]
            for place in places
            if batch.counterfactual_captions[place] != batch.captions[row]
        ]
        logits = torch.stack([scale[0] * (batch.image[row] @ column) for column in columns])
        total = total - torch.log_softmax(logits, 0)[row] / 2
        logits = scale * (batch.image @ batch.text[row])
        total = total - torch.log_softmax(logits, 0)[row] / 2
    return total / count


@pytest.mark.slow
def test_counting_is_the_mean_over_the_global_batch_however_unequal_the_ranks() -> None:
    """The first of three ranks has no counterfactual; those of other editors do not count; the scale is a constant."""

    def definition(batch: Whole) -> Tensor:
        return two_way(batch, batch.scale.detach()[0], by(batch, "number"))

    assert_defined_by(edited("counting", scale="logit_scale"), definition)
    expected = defined(edited("counting"), lambda batch: two_way(batch, 1.0, by(batch, "number", "colour")))
    assert_same(on_ranks(edited("counting", editors=("number", "colour")), 1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_as_negatives_they_are_further_texts_for_every_image_of_every_rank(exchange: str) -> None:
    setting = Setting(
        {"clip": 1.0, "counting": {"weight": 0.5, "as_negatives": True}},
        similarity={"exchange": exchange},
        edited=True,
        scale=4.0,
    )

    def definition(batch: Whole) -> Tensor:
        places = by(batch, "number")
        return clip_among(batch, places) + 0.5 * two_way(batch, 1.0, places)

    assert_defined_by(setting, definition, (1, 3) if exchange == "gather" else (3,))


def test_the_sigmoid_loss_takes_them_too() -> None:
    setting = Setting({"sigmoid": 1.0}, {"counterfactual_negatives": {"editors": ["colour"]}}, edited=True, bias=-2.0)

    def definition(batch: Whole) -> Tensor:
        total, count = batch.image.new_zeros(()), len(batch.image)
        for row in range(count):
            for other in range(count):
                sign = 1 if row == other else -1
                logit = batch.scale * (batch.image[row] @ batch.text[other]) + batch.bias
                total = total - torch.log(torch.sigmoid(sign * logit))[0]
            for place in by(batch, "colour"):
                if batch.counterfactual_captions[place] != batch.captions[row]:
                    logit = batch.scale * (batch.image[row] @ batch.counterfactuals[place]) + batch.bias
                    total = total - torch.log(torch.sigmoid(-logit))[0]
        return total / count

    assert_defined_by(setting, definition, (1,))


@pytest.mark.slow
def test_hard_negative_captions_are_among_all_texts() -> None:
    """In place of `clip`; those of the number editor have a term of their own."""
    assert_defined_by(edited("hard_negative_captions"), lambda batch: clip_among(batch, by(batch, "colour")), (1, 3))


def hinges(batch: Whole, margin: float) -> tuple[Tensor, float]:
    """The margin loss, counterfactual by counterfactual, and the mean difference of true and false captions."""
    total, differences = batch.image.new_zeros(()), []
    for place, row in enumerate(batch.counterfactual_rows.tolist()):
        difference = batch.scale.detach()[0] * (batch.image[row] @ (batch.text[row] - batch.counterfactuals[place]))
        total = total + torch.clamp(margin - difference, min=0)
        differences.append(float(difference.detach()))
    return total / len(differences), sum(differences) / len(differences)


@pytest.mark.slow
def test_the_margin_follows_the_model_within_its_limits() -> None:
    """The second step's margin is the mean difference of the first, over all ranks."""
    options = {"form": "margin", "margin": 0.1, "editors": ("number", "colour")}
    setting = edited("hard_negative_captions", **options)
    assert_defined_by(setting, lambda batch: hinges(batch, 0.1)[0], (1,))
    setting = replace(setting, terms={"hard_negative_captions": {**options, "largest_margin": 50.0}}, num_steps=2)
    _, mean = hinges(whole(setting, leaves(setting)), 0.1)
    assert 0.1 < mean < 50
    expected = defined(setting, lambda batch: hinges(batch, mean)[0], step=1)
    for world_size in (1, 3):
        assert_same(on_ranks(setting, world_size), expected)


def test_a_margin_stays_within_its_limits_and_is_saved() -> None:
    facts = RunFacts(dim=2, num_samples=4, num_steps=2, steps_per_epoch=1, seed=0, world=World())
    margin = FollowingMargin(0.5, 2.0, facts)
    for differences, expected in (([9.0, 5.0], 2.0), ([-3.0], 0.5), ([1.0, 2.0], 1.5), ([], 1.5)):
        margin.propose(torch.tensor(differences))
        margin.commit()
        assert float(margin.margin) == expected
    margin.propose(torch.tensor([0.7]))
    margin.discard()
    margin.commit()
    assert float(margin.margin) == 1.5
    other = FollowingMargin(0.5, 2.0, facts)
    other.restore(margin.replicated(), [])
    assert float(other.margin) == 1.5
    margin.propose(torch.tensor([math.nan]))
    check = margin.proposal_check()
    assert check is not None
    assert math.isnan(float(check))


@pytest.mark.slow
def test_degraded_copies_are_told_from_images_by_their_strength() -> None:
    def definition(batch: Whole) -> Tensor:
        total = batch.image.new_zeros(())
        for place, row in enumerate(batch.degraded_rows.tolist()):
            true, false = batch.image[row] @ batch.text[row], batch.degraded[place] @ batch.text[row]
            total = total - batch.strengths[place] * torch.log(true.exp() / (true.exp() + false.exp()))
        return total / len(batch.degraded_rows)

    assert_defined_by(edited("hard_negative_images"), definition)


def test_degraded_copies_may_be_positives_of_their_captions() -> None:
    """Among the samples that have one."""

    def definition(batch: Whole) -> Tensor:
        text = batch.text[batch.degraded_rows]
        logits = batch.scale * batch.degraded @ text.T
        return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2

    setting = Setting({"robust": {"kind": "clip", "between": ["degraded", "text"]}}, edited=True, scale=4.0)
    assert_defined_by(setting, definition, (1,))


@pytest.mark.parametrize("name", ["counterfactuals", "image", "text", "degraded"])
def test_what_is_no_number_is_not_hidden(name: str) -> None:
    terms = {
        "counting": {"as_negatives": True},
        "clip": 1.0,
        "margin": {"kind": "hard_negative_captions", "form": "margin", "margin": 0.5},
        "hard_negative_images": {},
    }
    setting = Setting(terms, edited=True, scale=4.0, spoiled=(name, 3))
    assert math.isnan(float(on_ranks(setting, 1)["value"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "margin"}, "margin: found 0"),
        ({"form": "margin", "margin": 2.0, "largest_margin": 1.0}, "largest_margin: found 1.0, which is less"),
        ({"margin": 2.0}, "margin: found 2.0, which means nothing with form: among_texts"),
        ({"as_negatives": True}, "as_negatives: found True, which means nothing with form: among_texts"),
        ({"editors": []}, "editors"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Terms).validate_python({"hard_negative_captions": options})


def edited_step(between: tuple[str, str]) -> PairStep:
    """Four images: the second one's caption is what a counterfactual of the first reads."""
    tokens, owners = torch.arange(4)[:, None].expand(-1, 2).contiguous(), torch.tensor([0, 0, 3])
    lengths, editors = (
        torch.full((4,), 2),
        torch.tensor([editor_key("colour"), editor_key("number"), editor_key("colour")]),
    )
    made = torch.tensor([[1, 1], [9, 9], [8, 8]])
    parts: dict[str, BatchPart] = {
        "text": Texts(tokens, lengths),
        "counterfactuals": Counterfactuals(made, lengths[:3], editors, owners=owners),
    }
    rows = torch.nn.functional.normalize(torch.arange(1, 25).reshape(4, 6).double().sin(), dim=1)
    outputs = {"image": rows, "text": rows.flip(1), "audio": rows, "counterfactuals": rows[:3]}
    batch = Batch(0, torch.arange(4), tuple("abcd"), parts)
    return pair_step({**outputs, "logit_scale": torch.ones(1).double()}, batch, Exchange(World()), between=between)


@pytest.mark.parametrize("between", [("image", "text"), ("text", "image")])
def test_texts_are_their_side_whichever_of_the_two_that_is(between: tuple[str, str]) -> None:
    """Each image has all of the chosen editors but those that read as its own caption; texts have none."""
    step = edited_step(between)
    further = CounterfactualNegatives(between=between, editors=("colour",)).negatives(step)
    assert further.num_columns("text").tolist() == [2, 1, 2, 2]
    assert further.num_columns("image").tolist() == [0] * 4
    image, columns = step.outputs["image"], step.outputs["counterfactuals"][[0, 2]]
    logits = 3 * image @ columns.T
    logits[1, 0] = -math.inf
    found = further.log_sum_exp(image, "text", torch.tensor([3.0]).double())
    torch.testing.assert_close(found, logits.logsumexp(1), rtol=1e-12, atol=1e-12)
    assert further.log_sum_exp(image, "image", torch.ones(1)).isneginf().all()


def test_between_kinds_without_texts_is_one_line() -> None:
    step = edited_step(("image", "audio"))
    with pytest.raises(EveryRankError, match="between image and audio: counterfactuals are of texts"):
        CounterfactualNegatives(between=("image", "audio")).negatives(step)
    term = HardNegativeCaptions(between=("image", "audio"), form="margin", margin=0.5)
    with pytest.raises(EveryRankError, match="between image and audio: counterfactuals are of texts"):
        term(step)


def test_data_without_counterfactuals_is_one_line() -> None:
    batch = Batch(0, torch.tensor([5]), ("a",), {"text": Texts(torch.ones(1, 2, dtype=torch.int64), torch.tensor([2]))})
    for terms, where in (
        ({"counting": 1.0}, "counting"),
        ({"clip": 1.0, "hard_negative_captions": {}}, "hard_negative"),
    ):
        with pytest.raises(EveryRankError, match=rf"objective\.{where}.*set data\.counterfactuals"):
            Objective(TypeAdapter(Terms).validate_python(terms)).count(batch)
