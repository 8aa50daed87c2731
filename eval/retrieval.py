"""Image-text retrieval both ways, with any number of captions an image."""

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from data.shards.cache import ShardCache
from eval.captioned import CaptionedImages, Embedded
from eval.encoder import Encoder, evaluation_mode
from eval.examples import Example, Examples, Retrieved, picture
from eval.ranks import TILE, Matches, find_matches_shared, score, share_group
from eval.shards import CaptionedEvaluation
from vlm.batch import Skip
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch
from vlm.training.data_record import DataRecord
from vlm.world import World

_RECALLS = (1, 5, 10)
_NUM_RETRIEVED = 5


class RetrievalConfig(CaptionedEvaluation):
    """Retrieval of captions by image and of images by caption, over the captioned samples of shards."""

    kind: Annotated[Literal["retrieval"], Field(description="images to texts and back")]
    tile: Annotated[int, Field(gt=0, le=2**20, description="Scores are computed in tiles of tile x tile.")] = TILE


class Retrieval:
    """Measures how often an image finds a caption of its own among all captions, and a caption its image among all.

    An image's rank is that of its best caption, and its other captions are not in the way. Where several images have
    the same caption, it is a right answer to each, and each to it. Other ties count against the model, so one that maps
    everything to one point scores nothing.

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
        self._captioned = CaptionedImages(config, image, tokenizer, root, where, cache)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a reader of the figures should know about the set."""
        return self._captioned.notices

    @property
    def record(self) -> DataRecord:
        """What tells the set that is measured on from another, wherever it lies."""
        return self._captioned.held_out.record

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""
        return self._captioned.skipped

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that `run` brings."""
        ways = (*_figures("image_to_text", [1]), *_figures("text_to_image", [1]))
        return (*ways, "num_images", "num_texts", "num_skipped")

    def run(self, model: Encoder, world: World) -> dict[str, float]:
        """R@1, R@5, R@10 (shares) and the median rank in both directions, and counts. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            embedded = self._captioned.embed(encoder, world)
            to_text = self._texts_by_image(embedded, world)
            to_image = find_matches_shared(
                embedded.texts, embedded.images, embedded.text_groups, embedded.image_groups, world, self._config.tile
            )
        num_images = len(embedded.images)
        return {
            **_figures("image_to_text", to_text.ranks.tolist()),
            **_figures("text_to_image", to_image.ranks.tolist()),
            "num_images": num_images,
            "num_texts": len(embedded.texts),
            "num_skipped": len(self._captioned.held_out) - num_images,
        }

    def examples(self, model: Encoder, world: World, count: int) -> Examples:
        """The `count` images that found their captions best (least rank, then highest score), and worst. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            embedded = self._captioned.embed(encoder, world)
            matches = self._texts_by_image(embedded, world)
        keys = list(zip(matches.ranks.tolist(), (-matches.scores).tolist(), strict=True))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        best, worst = order[:count], order[::-1][:count]
        return Examples(
            best=[self._example(embedded, matches, image) for image in best],
            worst=[self._example(embedded, matches, image) for image in worst],
        )

    def _texts_by_image(self, embedded: Embedded, world: World) -> Matches:
        return find_matches_shared(
            embedded.images, embedded.texts, embedded.image_groups, embedded.text_groups, world, self._config.tile
        )

    def _example(self, embedded: Embedded, matches: Matches, image: int) -> Example:
        owner = int(embedded.image_owners[image])
        scores = score(embedded.images[image : image + 1], embedded.texts)[0]
        nearest = scores.sort(descending=True, stable=True).indices[:_NUM_RETRIEVED].tolist()
        right = share_group(embedded.image_groups[image : image + 1], embedded.text_groups)[0]
        retrieved = [Retrieved(embedded.captions[text], bool(right[text]), float(scores[text])) for text in nearest]
        return Example(
            image=picture(self._captioned.held_out.stored_image(owner)),
            captions=list(self._captioned.held_out.captions[owner]),
            rank=int(matches.ranks[image]),
            retrieved=retrieved,
        )


def _figures(direction: str, ranks: list[int]) -> dict[str, float]:
    recalls = {f"{direction}_r@{most}": sum(rank <= most for rank in ranks) / len(ranks) for most in _RECALLS}
    return {**recalls, f"{direction}_median_rank": float(statistics.median(ranks))}
