"""NaN in anything that an objective reads makes its loss NaN: no comparison, mask or maximum hides it."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import pair_terms
from tests.vlm.objectives.parity import Setting, on_this_rank
from tests.vlm.objectives.small_blocks import small_blocks
from vlm.objectives.registry import PROVIDERS

QUEUE = {"queue": {"size": 16}}
ROW = 5
TEACHER_LEAVES = ("teacher_image", "teacher_text")


def setting(name: str, options: dict[str, Any] | None = None, **more: Any) -> Setting:
    return Setting(terms={name: {"weight": 1.0, **(options or {})}}, scale=5.0, **more)


SETTINGS = [
    setting("alignment"),
    setting("alignment", {"alpha": 1.0}),
    *(setting("attract_repel", {"by": by}) for by in ("sample", "caption", "label")),
    setting("attract_repel", {"cost": "rbf", "detach_weights": True}),
    setting("clip"),
    setting("clip", {"label_smoothing": 0.1, "margin": 0.2}),
    replace(setting("clip"), scale=90.0),
    replace(setting("clip"), scale=300.0),
    setting("clustered_negatives", {"clusters": (3,), "nearest": 2}),
    setting("clustered_negatives", {"form": "cluster_weights", "clusters": (3,)}),
    setting("clustered_negatives", {"form": "learned_weights", "hidden": 4}),
    *(
        setting("continuous", {"direction": direction, "weights_from": source, "threshold": 0.1})
        for direction in ("text_to_image", "image_to_text", "both")
        for source in ("image", "text", "teacher_image", "teacher_text")
    ),
    setting("cross_correlation"),
    setting("cross_correlation", {"standardize": False}),
    setting("cyclic"),
    setting("decoupled"),
    setting("decoupled", {"weighting": "von_mises", "detach_weights": True}),
    *(setting("fast_clip", {"version": version}) for version in ("v0", "v1", "v2", "v3")),
    setting("group_excluded"),
    setting("group_excluded", {"by": "caption"}),
    setting("hard", {"hardest": 0.3}),
    setting("hard", {"hardest": 0.9}),
    setting("individual_temperature"),
    setting("momentum_distillation", {"queue_size": 8}),
    setting("multi_head", {"heads": 2, "hardest": 4, "hidden": 4}),
    *(
        setting("multi_positive", {"form": form, "by": by})
        for form in ("log_sum", "mean_log")
        for by in ("sample", "caption", "label")
    ),
    setting("multi_positive", {"captions": "all"}, several_captions=True),
    setting("ordering", {"num_negatives": 3}),
    setting("sigmoid"),
    setting("supervised"),
    setting("supervised", {"temperature": None, "by": "caption"}),
    setting("uniformity", {"cross": 0.5}),
    setting("whitening", {"views": 2, "group_size": 3, "head": False}),
    setting("clip", providers=QUEUE),
    setting("sigmoid", providers=QUEUE),
    setting("decoupled", providers=QUEUE),
    setting("clip", providers={"feature_transform": {}, **QUEUE}),
    setting("clip", providers={"mixed_negatives": {"hardest": 4, "mixed": 4, "mixed_with_query": 2}, **QUEUE}),
    setting("hard_negative_captions", edited=True),
    setting("hard_negative_captions", {"form": "margin", "margin": 0.5, "editors": ("number",)}, edited=True),
    setting("clip", providers={"counterfactual_negatives": {}}, edited=True),
    setting("clip", similarity={"exchange": "ring"}),
    setting("decoupled", similarity={"exchange": "ring"}),
]


def readable(one: Setting) -> list[tuple[str, int]]:
    """The leaves and rows that the loss depends on: its gradient there is not 0 when all is well."""
    clean = on_this_rank(one)
    found = [
        (name, row)
        for name in ("image", "text", "scale", "bias")
        for row in ((0,) if name in ("scale", "bias") else (ROW,))
        if bool(clean[name][row].ne(0).any())
    ]
    needs = "teacher" in str(one.terms) or "momentum" in str(one.terms) or "queue" in one.providers
    sources = str(one.terms) if "teacher" in str(one.terms) else "teacher_image teacher_text"
    return found + [(name, ROW) for name in TEACHER_LEAVES if needs and name in sources]


def values(settings: list[Setting]) -> list[Tensor]:
    return [on_this_rank(one)["value"] for one in settings]


@pytest.fixture(scope="module")
def spoiled() -> list[Setting]:
    return [replace(one, spoiled=place) for one in SETTINGS for place in readable(one)]


def test_every_term_and_provider_is_here() -> None:
    named = {name for one in SETTINGS for name in (*one.terms, *one.providers)}
    assert named == {*pair_terms(), "hard_negative_captions", *PROVIDERS.all()}


def test_the_loss_is_no_number(spoiled: list[Setting]) -> None:
    assert len(spoiled) > 2 * len(SETTINGS)
    swallowed = [(one.terms, one.providers, one.spoiled) for one in spoiled if on_this_rank(one)["value"].isfinite()]
    assert not swallowed


def test_nor_is_it_in_small_blocks(spoiled: list[Setting]) -> None:
    some = spoiled[::4]
    with small_blocks():
        assert not [(one.terms, one.spoiled) for one, v in zip(some, values(some), strict=True) if v.isfinite()]


@pytest.mark.parametrize(
    "term", ["clip", "sigmoid", "decoupled", "hard", "group_excluded", "continuous", "multi_positive"]
)
@pytest.mark.parametrize("leaf", TEACHER_LEAVES)
def test_a_key_in_the_queue_that_is_none_is_not_passed_over(term: str, leaf: str) -> None:
    one = setting(term, providers=QUEUE, num_steps=2)
    assert on_this_rank(one)["value"].isfinite()
    assert not on_this_rank(replace(one, spoiled=(leaf, ROW)))["value"].isfinite()


@pytest.mark.parametrize("term", ["fast_clip", "individual_temperature"])
def test_nor_is_what_a_table_remembers(term: str) -> None:
    one = setting(term, {"gamma_schedule": "constant"}, num_steps=2)
    assert on_this_rank(one)["value"].isfinite()
    assert not on_this_rank(replace(one, spoiled=("image", ROW)))["value"].isfinite()


@pytest.mark.slow
def test_nor_on_any_of_three_ranks(spoiled: list[Setting]) -> None:
    some = spoiled[1::7]
    for found in run_ranks(values, 3, some):
        assert not [(one.terms, one.spoiled) for one, v in zip(some, found, strict=True) if v.isfinite()]
