"""Parts of a batch are cut, joined and moved with the samples that they belong to."""

import pytest
import torch
from torch import Tensor

from vlm.batch import Batch, BatchPart, Images, Skip, Texts


def pixels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def batch(first: int, count: int, owners: list[int], *, labels: bool = True) -> Batch:
    """Samples `first` and on; caption m has the token 10 m."""
    ids = torch.arange(first, first + count)
    tokens = 10 * torch.arange(len(owners))[:, None].expand(-1, 2 + count).contiguous()
    parts: dict[str, BatchPart] = {
        "image": Images(pixels(*ids.tolist())),
        "text": Texts(ids[:, None].contiguous(), torch.ones(count, dtype=torch.int64)),
        "captions": Texts(tokens, torch.full((len(owners),), 2 + count), owners=torch.tensor(owners)),
    }
    skipped = (Skip("s", "a.tar", "k", "bad", "other"),)
    return Batch(
        0, ids, tuple(map(str, ids.tolist())), parts, ids * 2 if labels else None, skipped, {"source/s": count}
    )


def test_a_part_of_the_samples_has_their_captions_counted_from_its_first() -> None:
    some = batch(5, 4, [0, 0, 1, 3, 3, 3]).take(1, 4)
    assert (some.sample_ids.tolist(), some.keys) == ([6, 7, 8], ("6", "7", "8"))
    assert some.labels is not None
    assert some.labels.tolist() == [12, 14, 16]
    assert some.pixels[:, 0, 0, 0].tolist() == [6, 7, 8]
    assert some.texts.tokens[:, 0].tolist() == [6, 7, 8]
    captions = some.parts["captions"]
    assert isinstance(captions, Texts)
    assert captions.tokens[:, 0].tolist() == [20, 30, 40, 50]
    assert some.owners("captions").tolist() == [0, 2, 2, 2]
    assert some.owners("image").tolist() == [0, 1, 2]
    assert (some.skipped, dict(some.counts)) == ((), {})  # they stay with the whole


@pytest.mark.parametrize(("start", "stop", "tokens"), [(0, 0, []), (2, 3, []), (0, 4, [0, 10, 20, 30, 40, 50])])
def test_samples_without_captions_have_none(start: int, stop: int, tokens: list[int]) -> None:
    captions = batch(5, 4, [0, 0, 1, 3, 3, 3]).take(start, stop).parts["captions"]
    assert isinstance(captions, Texts)
    assert captions.tokens[:, 0].tolist() == tokens


def test_ranks_batches_joined_are_the_batch_of_all_with_short_texts_padded() -> None:
    whole = Batch.cat([batch(0, 2, [0, 1, 1]), batch(2, 1, [0, 0])])
    assert whole.sample_ids.tolist() == [0, 1, 2]
    assert whole.keys == ("0", "1", "2")
    assert whole.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert whole.owners("captions").tolist() == [0, 1, 1, 2, 2]
    captions = whole.parts["captions"]
    assert isinstance(captions, Texts)
    assert captions.tokens.tolist() == [[0] * 4, [10] * 4, [20] * 4, [0] * 4, [10, 10, 10, 0]]
    assert captions.lengths.tolist() == [4, 4, 4, 3, 3]
    assert Batch.cat([batch(0, 2, [0]), batch(2, 1, [0], labels=False)]).labels is None


def test_pinning_and_moving_reach_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: what is counted are the tensors that would be."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch(0, 2, [0, 1, 1]).pin_memory()
    assert len(pinned) == 8  # ids, labels, pixels, and of both texts tokens, lengths and once owners
    moved = batch(0, 2, [0, 1, 1]).to(torch.device("meta"))
    for name, part in moved.parts.items():
        assert all(tensor.is_meta for tensor in vars(part).values() if tensor is not None), name
    assert moved.sample_ids.is_meta
