"""The recipes of CoCa that ship: the small one trains, the others have the sizes of the paper."""

from pathlib import Path

import pytest
import torch

from launch.caption import caption_pictures
from launch.recipe import load_recipe
from launch.recipe_file import RECIPES
from tests.data.small_shards import with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here
from vlm.generation.config import GenerationConfig
from vlm.model.captioner import CaptionDecoder, ImagePooler
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.foreign import ForeignFiles
from vlm.model.resolve import resolve
from vlm.model.tokenizer import Tokenizer, full_tokenizer
from vlm.model.tower_config import TowerContext
from vlm.model.transformers_models import TransformersModels

CLIP_TOKENS, PAPERS_TOKENS = 49_408, 64_000


def num_parameters(name: str) -> tuple[int, int, int]:
    """Of a recipe's image tower, its poolers, and its text tower and decoder together; nothing is allocated."""
    files = ForeignFiles()
    model = resolve(load_recipe(name).model, files)
    towers, config = model.towers, model.captioner
    assert towers is not None
    assert isinstance(config, CaptionerConfig)
    assert config.width is not None
    assert model.image_size is not None
    context = TowerContext(towers.embed_dim, model.image_size, False, files, TransformersModels())
    tokenizer = Tokenizer(full_tokenizer(towers.text.tokenizer_fields(), files), shorten=False)
    with torch.device("meta"):
        image, text = towers.image.build(context), towers.text.build(context, tokenizer)
        cascade = config.model_copy(update={"pooler": "cascade"})  # the default of these towers
        pooler = ImagePooler(cascade, config.width, config.width, towers.embed_dim)
        decoder = CaptionDecoder(config, config.width, config.width, CLIP_TOKENS)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (image, pooler, text, decoder)]
    return counts[0], counts[1], counts[2] + counts[3]


# Of the paper's table 1, in millions: image encoder and decoder; the last column are the decoder's layers, width, MLP.
@pytest.mark.parametrize(
    ("name", "image", "decoder", "sizes"),
    [
        ("coca-base", 86, 297, (12, 768, 3072)),
        ("coca-large", 303, 484, (12, 1024, 4096)),
        ("coca-2b", 1000, 1100, (18, 1408, 5632)),
    ],
)
def test_sizes_are_those_of_the_paper(name: str, image: int, decoder: int, sizes: tuple[int, int, int]) -> None:
    layers, width, mlp = sizes
    of_image, of_poolers, of_decoder = num_parameters(name)
    second_mlps = layers * 2 * width * mlp  # open_clip's blocks across have MLPs of their own
    tokens = 2 * (PAPERS_TOKENS - CLIP_TOKENS) * width  # their embeddings, and the map to their logits
    assert of_image / 1e6 == pytest.approx(image, rel=0.015)
    as_in_paper = (of_decoder - second_mlps + tokens) / 1e6
    rounding = 0.08 if name == "coca-2b" else 0.005  # 1,180 M are "1.1 B" there
    assert as_in_paper == pytest.approx(decoder, rel=rounding)
    head = RECIPES / f"{name}.yaml"
    total = (of_image + of_poolers + of_decoder) / 1e6
    said = f"{total / 1000:.1f} B here" if total > 1000 else f"{total:.0f} M here"
    assert said in head.read_text().partition("\n")[0]


def test_training_follows_the_paper() -> None:
    base, largest = load_recipe("coca-base"), load_recipe("coca-2b")
    assert largest.model_copy(update={"model": base.model, "run": base.run, "engine": base.engine}) == (
        base.model_copy(update={"micro_batch": largest.micro_batch})
    )
    assert base.duration.steps(base.global_batch, 10**9) == 500_000
    assert base.schedule.warmup.steps(base.global_batch, 10**9) == 10_000
    assert base.schedule.factor(0.25) == 0.75
    assert base.objective.keys() == {"clip", "caption"}


def test_the_small_one_trains_and_captions(tmp_path: Path) -> None:
    run, samples = tmp_path / "run", [with_json(n, captions=[f"{n} large red stars"]) for n in range(24)]
    write_shard(tmp_path / "train-0.tar", samples)
    write_shard(tmp_path / "retrieval-0.tar", samples[:8])
    given = (f"data.root={tmp_path}", f"run={run}", "duration=2 steps", "global_batch=8", "trackers=[]")
    train_here("coca-tiny", given)
    figures = {key for line in metrics_of(run) for key in line}
    assert {"eval/captions/cider_d", "eval/retrieval/image_to_text_r@1", "caption"} <= figures
    found = caption_pictures(str(run), [str(tmp_path / "retrieval-*.tar")], GenerationConfig(max_length=4))
    assert len(found) == 8
