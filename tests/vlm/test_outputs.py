"""Outputs by name: those of micro-batches joined, and a loss with given gradients."""

import torch

from vlm.outputs import is_shared, joined, loss_with, module_key, output_name, term_parameters


def test_rows_are_put_together_and_what_is_shared_is_taken_once() -> None:
    scale, weight = torch.tensor([2.0]), torch.ones(3)
    parts = [{"image": torch.full((n, 2), float(n)), "logit_scale": scale, "clip/w": weight} for n in (1, 2)]
    whole = joined(parts)
    assert whole["image"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert whole["logit_scale"] is scale
    assert whole["clip/w"] is weight
    assert [is_shared(name) for name in ("image", "logit_scale", "logit_bias", "clip/w")] == [False, True, True, True]


def test_the_loss_has_the_given_gradients_and_reaches_every_output() -> None:
    outputs = {name: torch.randn(3, requires_grad=True) for name in ("a", "b")}
    loss_with({"a": torch.tensor([1.0, -2.0, 0.5])}, outputs).backward()
    assert outputs["a"].grad is not None
    assert outputs["a"].grad.tolist() == [1.0, -2.0, 0.5]
    assert outputs["b"].grad is not None
    assert outputs["b"].grad.tolist() == [0, 0, 0]


def test_a_terms_parameters_have_its_name_before_theirs() -> None:
    outputs = {"near/w": torch.ones(1), "nearest/w": torch.zeros(1), "image": torch.zeros(1, 2)}
    assert list(term_parameters(outputs, "near")) == ["w"]
    assert output_name(module_key("near/w")) == "near/w"
    assert "/" not in module_key("near/w")
