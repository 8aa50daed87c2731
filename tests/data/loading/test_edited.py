"""Counterfactual captions and degraded images in batches: exact shares, keyed draws, the same on any world."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError

from data.config import DataConfig
from data.counterfactuals.numbers import NUMBERS
from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.source_shares import weights_with_shares
from tests.data.small_shards import WordTokenizer, picture, sample, texts, with_json, write_shard, write_source
from vlm.batch import Batch, Counterfactuals, DegradedImages, editor_key
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch

SIZE = 16


class ShortTokenizer(WordTokenizer):
    """One that cuts texts after 12 characters."""

    context_length = 12

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        return super().__call__([text[:12] for text in texts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without a number, and a counting set of which one caption has none."""
    folder = tmp_path_factory.mktemp("edited")
    write_source(folder, [9, 14], "web")
    words = sorted(NUMBERS)
    counting = [sample(n, jpg=picture(n), txt=f"{words[n % 9]} stars {n}") for n in range(100, 110)]
    write_shard(folder / "counting-0.tar", [*counting, sample(110, jpg=picture(110), txt="no star")])
    return folder


def stream(folder: Path, world: World | None = None, tokenizer: Any = None, **fields: Any) -> TrainStream:
    values = {
        "root": str(folder),
        "sources": {
            "web": {"shards": "web-*.tar"},
            "counting": {"shards": "counting-*.tar", "share": "1/4", "counterfactuals": "number"},
        },
        "workers": 0,
        **fields,
    }
    config = DataConfig.model_validate(values)
    image, tokenizer = ImageSpec(size=SIZE), tokenizer or WordTokenizer()
    return TrainStream(config, image, tokenizer, global_batch=8, seed=0, world=world or World())


def counterfactuals(batch: Batch) -> dict[str, str]:
    """The counterfactual of each caption that has one."""
    part = batch.parts["counterfactuals"]
    assert isinstance(part, Counterfactuals)
    assert (part.editors == editor_key("number")).all()
    own = texts(batch.texts.tokens, batch.texts.lengths)
    made = texts(part.tokens, part.lengths)
    return {own[owner]: text for owner, text in zip(batch.owners("counterfactuals").tolist(), made, strict=True)}


def test_a_source_has_its_share_of_every_batch_and_its_captions_another_number(folder: Path) -> None:
    batches = list(stream(folder).batches(0, 40))
    assert {batch.counts["source/counting"] for batch in batches} == {2}
    seen: dict[str, set[str]] = {}
    for batch in batches:
        made = counterfactuals(batch)
        numbered = [text for text in texts(batch.texts.tokens, batch.texts.lengths) if "stars" in text]
        assert set(made) == set(numbered)
        assert batch.counts.get("counterfactual/number", 0) == len(numbered) == len(batch.owners("counterfactuals"))
        assert batch.counts.get("counterfactual/none", 0) == 2 - len(numbered)
        for own, text in made.items():
            word, _, rest = own.partition(" ")
            other, _, other_rest = text.partition(" ")
            assert (other in NUMBERS, other != word, other_rest) == (True, True, rest)
            seen.setdefault(own, set()).add(other)
    assert all(len(others) > 2 for others in seen.values())  # drawn anew in each epoch


def test_any_world_and_any_restart_has_the_same_counterfactuals(folder: Path) -> None:
    whole = list(stream(folder).batches(0, 9))
    ranks = [list(stream(folder, World(rank, 3), workers=rank).batches(2, 7)) for rank in range(3)]
    empty = False
    for step, batch in enumerate(whole[2:]):
        together: dict[str, str] = {}
        for rank in ranks:
            made = counterfactuals(rank[step])
            empty |= not made
            together |= made
        assert together == counterfactuals(batch)
    assert empty  # a rank without any


def test_what_a_tokenizer_cuts_off_is_no_difference(folder: Path, tmp_path: Path) -> None:
    captions = ["two stars", "a long caption and only then two stars"]
    shard = write_shard(tmp_path / "a.tar", [sample(n, jpg=picture(n), txt=captions[n % 2]) for n in range(8)])
    sources = {"a": {"shards": str(shard), "counterfactuals": "number"}}
    (batch,) = stream(folder, tokenizer=ShortTokenizer(), sources=sources).batches(0, 1)
    assert set(counterfactuals(batch)) == {"two stars"}
    assert len(batch.owners("counterfactuals")) == 4


def test_negatives_that_repeat_a_caption_are_in_the_ledger_and_the_sample_stays(folder: Path, tmp_path: Path) -> None:
    good = [with_json(n, caption=f"dog {n}", negatives=[f"cat {n}"]) for n in range(6)]
    repeated = with_json(6, caption="dog 6", negatives=["Dog 6."])
    wrong = with_json(7, caption="dog 7", negatives=[7])
    shard = write_shard(tmp_path / "a.tar", [*good, repeated, wrong])
    sources = {"a": {"shards": str(shard)}}
    (batch,) = stream(folder, sources=sources, counterfactuals="stored").batches(0, 1)
    (text, bad) = sorted(batch.skipped, key=lambda skip: skip.key)
    assert (text.key, text.reason) == (
        "000006",
        "its negatives repeat its captions: the sample is used without a counterfactual",
    )
    assert (bad.key, bad.reason) == ("000007", "a caption is no text but 7")
    assert "000006" in batch.keys
    part = batch.parts["counterfactuals"]
    assert isinstance(part, Counterfactuals)
    assert sorted(set(texts(part.tokens, part.lengths))) == [f"cat {n}" for n in range(6)]


def test_a_dropped_caption_has_no_counterfactual(folder: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [with_json(n, caption=f"dog {n}", negatives=["cat"]) for n in range(8)])
    data = stream(folder, sources={"a": {"shards": str(shard)}}, counterfactuals="stored", caption={"dropout": 0.5})
    for batch in data.batches(0, 3):
        own = texts(batch.texts.tokens, batch.texts.lengths)
        assert batch.owners("counterfactuals").tolist() == [row for row, text in enumerate(own) if text]
        assert batch.counts["counterfactual/none"] == own.count("")


def test_captions_without_anything_to_edit_are_refused_before_the_first_step(folder: Path) -> None:
    sources = {"web": {"shards": "web-*.tar", "counterfactuals": ["number", "negation"]}}
    with pytest.raises(UserError) as caught:
        stream(folder, sources=sources)
    message = str(caught.value)
    assert message.startswith("data.sources.web.counterfactuals: none of the first 23 captions of ")
    assert message.endswith("has anything that number, negation could edit; the first is 'caption number 0'")


def test_streaming_without_an_index_has_them_too(folder: Path) -> None:
    sources = {"counting": {"shards": "counting-*.tar", "num_samples": 11}}
    values = {"root": str(folder), "sources": sources, "workers": 0, "mode": "sequential", "counterfactuals": "number"}
    config = DataConfig.model_validate({**values, "degraded": "blur"})
    data = SequentialStream(config, ImageSpec(size=SIZE), WordTokenizer(), global_batch=8, seed=0, world=World())
    (batch,) = data.batches(0, 1)
    assert len(counterfactuals(batch)) >= 4
    assert len(batch.owners("degraded")) == 8


def shares(sources: dict[str, dict[str, Any]], **fields: Any) -> dict[str, float]:
    full = {name: {"shards": "x.tar", **source} for name, source in sources.items()}
    weights = DataConfig.model_validate({"sources": full, **fields}).weights(dict.fromkeys(full, 10))
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def test_a_share_is_said_or_usual_and_the_rest_is_by_weight() -> None:
    numbers = {"counterfactuals": "number"}
    assert shares({"a": {"weight": 3}, "b": {}, "c": {"share": 0.2}}) == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    assert shares({"a": {}, "c": numbers}) == {"a": 31 / 32, "c": 1 / 32}
    assert shares({"a": {}, "c": {**numbers, "weight": 1.0}}) == {"a": 0.5, "c": 0.5}
    assert shares({"a": numbers, "c": numbers}) == {"a": 0.5, "c": 0.5}
    assert shares({"a": {"counterfactuals": "none"}, "c": {}}, counterfactuals="number") == {"a": 31 / 32, "c": 1 / 32}
    assert shares({"a": {}, "c": numbers}, mix="once") == {"a": 0.5, "c": 0.5}
    assert shares({"a": {"share": "1 / 3"}, "c": {"share": 2 / 3}}) == pytest.approx({"a": 1 / 3, "c": 2 / 3})
    assert weights_with_shares({"a": 5.0}, {}) == {"a": 5.0}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {"share": 0.5}}, "shares: those of a add up to less than 1, and no source has the rest"),
        ({"a": {"share": 1.0}, "b": {}}, "shares: those of a add up to 1"),
        ({"a": {"share": 0.7}, "b": {"share": 0.7}}, "shares: those of a, b add up to more than 1"),
        ({"a": {"share": 0}, "b": {}}, "share"),
        ({"a": {"share": "1/0"}, "b": {}}, "share"),
        ({"a": {"share": "a/b"}, "b": {}}, "share"),
        ({"a": {"counterfactuals": "nummber"}}, "no editor 'nummber'; nearest: number"),
    ],
)
def test_wrong_shares_are_refused(sources: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shares(sources)
    with pytest.raises(ValidationError, match=r"`mix: once` takes shares from sizes; sources\.a\.share says otherwise"):
        shares({"a": {"share": 0.5}, "b": {}}, mix="once")


def degraded(batch: Batch) -> DegradedImages:
    part = batch.parts["degraded"]
    assert isinstance(part, DegradedImages)
    return part


def test_a_degraded_copy_is_the_view_blurred_or_compressed_by_its_strength(folder: Path) -> None:
    options = {"by": {"blur": {"sigma": 0.1}, "jpeg": {"quality": 5}}, "strength": [0.0, 1.0]}
    ways = Counter[str]()
    for batch in stream(folder, degraded=options).batches(0, 4):
        part = degraded(batch)
        assert part.owners is not None
        assert part.owners.tolist() == list(range(8))
        for view, copy, strength in zip(
            batch.pixels.numpy(), part.pixels.numpy(), part.strengths.tolist(), strict=True
        ):
            image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
            blurred = image.filter(ImageFilter.GaussianBlur(0.1 * strength * SIZE))
            stored = io.BytesIO()
            image.save(stored, "JPEG", quality=round(95 - 90 * strength))
            expected = {"blur": blurred, "jpeg": Image.open(stored).convert("RGB")}
            same = [name for name, one in expected.items() if (np.asarray(one) == copy.transpose(1, 2, 0)).all()]
            assert same
            ways.update(same)
    assert min(ways["blur"], ways["jpeg"]) >= 8


def test_strength_zero_changes_nothing_and_a_share_leaves_some_without(folder: Path) -> None:
    options = {"by": {"blur": {}, "jpeg": {}}, "strength": [0.0, 0.0], "share": 0.5}
    whole = list(stream(folder, degraded=options).batches(0, 12))
    num = 0
    for batch in whole:
        part = degraded(batch)
        assert torch.equal(part.pixels, batch.pixels[part.owners])
        num += len(part.strengths)
    assert 48 - 20 < num < 48 + 20
    ranks = [list(stream(folder, World(rank, 2), degraded=options, workers=1).batches(0, 12)) for rank in range(2)]
    for step, batch in enumerate(whole):
        together = torch.cat([degraded(rank[step]).pixels for rank in ranks])
        assert torch.equal(together, degraded(batch).pixels)
    plain = next(iter(stream(folder).batches(0, 1)))
    assert torch.equal(plain.pixels, whole[0].pixels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": {}}, "by"),
        ("blurr", "no degradation 'blurr'; nearest: blur"),
        ({"by": {"blur": {}}, "strength": [0.5, 0.2]}, "degraded.strength\n.*found"),
        ({"by": {"jpeg": {"quality": 0}}}, "quality"),
    ],
)
def test_wrong_degradations_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"sources": {"a": {"shards": "x.tar"}}, "degraded": given})
    with pytest.raises(ValidationError, match="images: found false; there is nothing to be degraded"):
        DataConfig.model_validate({"sources": {"a": {"shards": "x.tar"}}, "degraded": "blur", "images": False})
