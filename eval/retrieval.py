"""Image-text retrieval both ways, with any number of captions an image."""

import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor

from data.shards.cache import ShardCache
from eval.encoder import Encoder, embed_images, embed_texts, evaluation_mode
from eval.examples import Example, Examples, Retrieved, picture
from eval.ranks import TILE, Matches, find_matches_shared, score
from eval.shards import ShardEvaluation
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch
from vlm.world import World

_RECALLS = (1, 5, 10)
_NUM_RETRIEVED = 5


class RetrievalConfig(ShardEvaluation):
    """Retrieval of captions by image and of images by caption, over the captioned samples of shards."""

    kind: Literal["retrieval"]
    tile: Annotated[int, Field(gt=0, description="Scores are computed in tiles of tile x tile.")] = TILE


class _Embedded(NamedTuple):
    """A whole held-out set: usable images, their captions, and for both the position of the sample they are from."""

    images: Float32[Tensor, "images dim"]
    image_owners: Int64[Tensor, " images"]
    texts: Float32[Tensor, "texts dim"]
    text_owners: Int64[Tensor, " texts"]
    captions: tuple[str, ...]


class Retrieval:
    """Measures how often an image finds a caption of its own among all captions, and a caption its image among all.

    An image's rank is that of its best caption, and its other captions are not in the way. Ties count against the
    model, so one that maps everything to one point scores nothing. Samples without a usable image or caption take no
    part.

    Raises:
        UserError: shards without captions.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        image: ImageSpec,
        tokenizer: Callable[[Sequence[str]], TokenBatch],
        root: str | None,
        where: str = "shards",
        cache: ShardCache | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._held_out = config.held_out(image, root, where, cache)
        self._where = where
        if not any(self._held_out.captions):
            raise UserError(f"{where}: no sample of {config.shards} has a caption (txt, or json with `captions`)")

    def run(self, model: Encoder, world: World) -> dict[str, float]:
        """R@1, R@5, R@10 (shares) and the median rank in both directions, and counts. Collective."""
        with evaluation_mode(model):
            embedded = self._embed(model, world)
            to_text = self._texts_by_image(embedded, world)
            to_image = find_matches_shared(
                embedded.texts, embedded.images, embedded.text_owners, embedded.image_owners, world, self._config.tile
            )
        num_images = len(embedded.images)
        return {
            **_figures("image_to_text", to_text.ranks.tolist()),
            **_figures("text_to_image", to_image.ranks.tolist()),
            "num_images": num_images,
            "num_texts": len(embedded.texts),
            "num_skipped": len(self._held_out) - num_images,
        }

    def examples(self, model: Encoder, world: World, count: int) -> Examples:
        """The `count` images that found their captions best (least rank, then highest score), and worst. Collective."""
        with evaluation_mode(model):
            embedded = self._embed(model, world)
            matches = self._texts_by_image(embedded, world)
        keys = list(zip(matches.ranks.tolist(), (-matches.scores).tolist(), strict=True))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        best, worst = order[:count], order[::-1][:count]
        return Examples(
            best=[self._example(embedded, matches, image) for image in best],
            worst=[self._example(embedded, matches, image) for image in worst],
        )

    def _embed(self, model: Encoder, world: World) -> _Embedded:
        """Every rank holds all embeddings: memory grows with images plus texts, not with their product."""
        config = self._config
        images, owners = embed_images(model, self._held_out, world, config.batch_size, config.workers)
        captioned = torch.tensor([bool(captions) for captions in self._held_out.captions], device=world.device)[owners]
        images, owners = images[captioned], owners[captioned]
        if not len(images):
            raise UserError(
                f"{self._where}: none of the {len(self._held_out)} samples has a readable image and caption"
            )
        texts = embed_texts(model, self._tokens, world, config.batch_size)
        text_owners = torch.tensor(self._text_owners, device=world.device)
        usable = torch.isin(text_owners, owners)
        captions = tuple(self._texts[place] for place in usable.nonzero().flatten().tolist())
        return _Embedded(images, owners, texts[usable], text_owners[usable], captions)

    def _texts_by_image(self, embedded: _Embedded, world: World) -> Matches:
        return find_matches_shared(
            embedded.images, embedded.texts, embedded.image_owners, embedded.text_owners, world, self._config.tile
        )

    def _example(self, embedded: _Embedded, matches: Matches, image: int) -> Example:
        owner = int(embedded.image_owners[image])
        scores = score(embedded.images[image : image + 1], embedded.texts)[0]
        nearest = scores.sort(descending=True, stable=True).indices[:_NUM_RETRIEVED].tolist()
        retrieved = [
            Retrieved(embedded.captions[text], int(embedded.text_owners[text]) == owner, float(scores[text]))
            for text in nearest
        ]
        return Example(
            image=picture(self._held_out.stored_image(owner)),
            captions=list(self._held_out.captions[owner]),
            rank=int(matches.ranks[image]),
            retrieved=retrieved,
        )

    @cached_property
    def _texts(self) -> list[str]:
        return [caption for captions in self._held_out.captions for caption in captions]

    @cached_property
    def _text_owners(self) -> list[int]:
        return [owner for owner, captions in enumerate(self._held_out.captions) for _ in captions]

    @cached_property
    def _tokens(self) -> TokenBatch:
        return self._tokenizer(self._texts)


def _figures(direction: str, ranks: list[int]) -> dict[str, float]:
    recalls = {f"{direction}_r@{most}": sum(rank <= most for rank in ranks) / len(ranks) for most in _RECALLS}
    return {**recalls, f"{direction}_median_rank": float(statistics.median(ranks))}
