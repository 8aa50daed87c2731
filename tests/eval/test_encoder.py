"""Embedding on all ranks: the model comes back as it was, and no rank runs a forward more than another."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from data.loading.heldout import HeldOutSet
from eval.encoder import embed_images, embed_texts, evaluation_mode
from eval.recipe import AnyEvaluatorConfig, build_evaluators
from tests.data.small_shards import WordTokenizer, write_source
from tests.eval.encoders import CONTEXT, DIM, IMAGE, SmallEncoder, captioned_shard, embed, labelled_shard
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.progress import on_progress
from vlm.training.precision import Precision

TEXTS = [f"text number {n}{'!' * (n % 5)}" for n in range(10)]


def test_each_module_trains_afterwards_as_before() -> None:
    encoder = SmallEncoder()
    frozen = torch.nn.Dropout().eval()
    encoder.add_module("frozen", frozen)
    with evaluation_mode(encoder):
        assert not encoder.training
        assert not encoder.dropout.training
        assert not encoder.encode_text(*WordTokenizer()(TEXTS)).requires_grad
    assert (encoder.training, encoder.dropout.training, frozen.training) == (True, True, False)
    assert encoder.encode_text(*WordTokenizer()(TEXTS)).requires_grad


def test_precision_is_that_of_the_evaluation_whatever_surrounds_it() -> None:
    encoder = SmallEncoder()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows = (images.double().flatten(1) / 255 - 0.5) @ encoder.pixels.detach().double()
    errors = {}
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        with torch.autocast("cpu", torch.bfloat16), evaluation_mode(encoder, "after_head", precision):
            found = encoder.encode_image(images).double()
        errors[precision] = float((found - rows / rows.norm(dim=1, keepdim=True)).abs().max())
    assert errors["fp32"] < 1e-5
    assert errors["bf16"] > 1e-4


def test_evaluations_tell_how_far_they_are(tmp_path: Path) -> None:
    write_source(tmp_path, [10], "test")
    heard: list[tuple[str, int, int]] = []
    with on_progress(lambda *told: heard.append(told)):
        on_this_rank(str(tmp_path / "test-*.tar"), 4)
    read = [("images", n, 10) for n in (0, 4, 8)] + [("texts", n, 10) for n in (0, 4, 8)]
    assert heard == [("indexing shards", 1, 1), *read]


def on_this_rank(pattern: str, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]:
    encoder = SmallEncoder()
    world = World.current()
    with evaluation_mode(encoder):
        images = embed_images(encoder, HeldOutSet(pattern, IMAGE), world, batch_size, 0)
        texts = embed_texts(encoder, WordTokenizer()(TEXTS), world, batch_size)
    return images.rows, images.indices, texts, encoder.num_forwards


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_all_embeddings_after_the_same_number_of_forwards(
    tmp_path: Path, world_size: int, batch_size: int
) -> None:
    pattern = write_source(tmp_path, [4, 3])
    results = (
        [on_this_rank(pattern, batch_size)]
        if world_size == 1
        else run_ranks(on_this_rank, world_size, pattern, batch_size)
    )
    pixels = [batch.images[0] for batch in HeldOutSet(pattern, IMAGE).batches(World(), 1)]
    expected_images, expected_texts = embed(SmallEncoder(), pixels, TEXTS)
    for rows, indices, texts, num_forwards in results:
        assert indices.tolist() == list(range(7))
        torch.testing.assert_close(rows.double(), expected_images, rtol=0, atol=1e-6)
        torch.testing.assert_close(texts.double(), expected_texts, rtol=0, atol=1e-6)
        assert num_forwards == results[0][3]
        assert torch.equal(rows, results[0][0])
        assert torch.equal(texts, results[0][2])


def test_more_ranks_than_texts(tmp_path: Path) -> None:
    results = run_ranks(on_this_rank, 3, write_source(tmp_path, [2]), 1)
    assert [result[1].tolist() for result in results] == [[0, 1]] * 3
    assert all(result[3] == {"image": 1, "text": 4} for result in results)


class HeadedEncoder(SmallEncoder):
    """Its embeddings are another encoder's, with a head that turns and stretches them."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = SmallEncoder()
        self.head = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(8))

    def before_head(self) -> SmallEncoder:
        return self.towers

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.towers.encode_image(images) @ self.head, dim=1)

    def encode_text(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.towers.encode_text(tokens, lengths) @ self.head, dim=1)


@pytest.mark.parametrize("kind", ["retrieval", "geometry", "zeroshot"])
def test_evaluators_read_before_the_head_where_asked(tmp_path: Path, kind: str) -> None:
    captions = [[f"{n} {'abcdefgh'[n % 8] * 3}"] for n in range(12)]
    pattern = captioned_shard(tmp_path, captions) if kind != "zeroshot" else labelled_shard(tmp_path, [0, 1, 2] * 4)
    own = {"classes": ["aa", "bcb", "dd"]} if kind == "zeroshot" else {}

    def figures(encoder: SmallEncoder, embedding: str) -> dict[str, float]:
        values = {"kind": kind, "shards": pattern, "embedding": embedding, "batch_size": 5, **own}
        config = TypeAdapter(AnyEvaluatorConfig).validate_python(values)
        (evaluator,) = build_evaluators({"held": config}, CONTEXT).values()
        return evaluator.run(encoder, World()).figures

    headed = HeadedEncoder()
    assert figures(headed, "before_head") == figures(headed.towers, "after_head")
    assert figures(headed, "after_head") != figures(headed, "before_head")
    assert figures(headed.towers, "before_head") == figures(headed.towers, "after_head")  # without heads: one kind
