"""Image-text retrieval both ways, with any number of captions an image."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from eval.captioned import CaptionedEvaluator, CaptionedImages, Embedded
from eval.encoder import Encoder, evaluation_mode
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.examples import Examples, RetrievalExample, Retrieved, picture
from eval.metrics import RECALLS, RETRIEVAL
from eval.ranks import TILE, Matches, find_matches_shared, in_common_group, score
from eval.shards import CaptionedEvaluationConfig
from vlm.distributed.world import World
from vlm.evaluation import Evaluation

NUM_EXAMPLES = 6  # best and worst retrievals each
_NUM_RETRIEVED = 5


@EVALUATORS.register("retrieval")
class RetrievalConfig(CaptionedEvaluationConfig):
    """Retrieval of captions by image and of images by caption, over the captioned samples of shards."""

    kind: Annotated[Literal["retrieval"], Field(description="images to texts and back")]
    tile: Annotated[int, Field(gt=0, le=2**20, description="Scores are computed in tiles of tile x tile.")] = TILE

    def build(self, context: EvaluationContext) -> "Retrieval":
        """See `Retrieval`."""
        return Retrieval(self, context)


class Retrieval(CaptionedEvaluator):
    """How often an image finds a caption of its own among all captions, and a caption its image among all.

    An image's rank is that of its best caption, and its other captions are not in the way. Where several images have
    the same caption, it is a right answer to each, and each to it. Other ties count against the model, so one that maps
    everything to one point scores nothing.

    Raises:
        UserError: shards without captions.
    """

    metrics = RETRIEVAL

    def __init__(self, config: RetrievalConfig, context: EvaluationContext) -> None:
        self._config = config
        self._captioned = CaptionedImages(config, context)

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Ranks of the right ones both ways; examples are the best and the worst images. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            embedded = self._captioned.embed(encoder, world)
            to_text = find_matches_shared(
                embedded.images, embedded.texts, embedded.image_groups, embedded.text_groups, world, self._config.tile
            )
            to_image = find_matches_shared(
                embedded.texts, embedded.images, embedded.text_groups, embedded.image_groups, world, self._config.tile
            )
        num_images = len(embedded.images)
        figures = {
            **_figures("image_to_text", to_text.ranks.tolist()),
            **_figures("text_to_image", to_image.ranks.tolist()),
            "num_images": num_images,
            "num_texts": len(embedded.texts),
            "num_skipped": len(self._captioned.held_out) - num_images,
        }
        return Evaluation(figures, examples=RetrievalExamples(self._captioned, embedded, to_text))


@dataclass(frozen=True)
class RetrievalExamples:
    """The images that found their captions best and worst; their pictures are read when they are written.

    The best have the least rank, then the highest score.
    """

    captioned: CaptionedImages
    embedded: Embedded
    matches: Matches

    def write(self, folder: Path) -> Sequence[Path]:
        """Write pictures and listing as `Examples` does."""
        return self.choose(NUM_EXAMPLES).write(folder)

    def choose(self, count: int) -> Examples[RetrievalExample]:
        """The `count` best and the `count` worst."""
        keys = list(zip(self.matches.ranks.tolist(), (-self.matches.scores).tolist(), strict=True))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        best, worst = order[:count], order[::-1][:count]
        return Examples(best=[self._example(image) for image in best], worst=[self._example(image) for image in worst])

    def _example(self, image: int) -> RetrievalExample:
        embedded = self.embedded
        owner = int(embedded.image_owners[image])
        scores = score(embedded.images[image : image + 1], embedded.texts)[0]
        nearest = scores.sort(descending=True, stable=True).indices[:_NUM_RETRIEVED].tolist()
        right = in_common_group(embedded.image_groups[image : image + 1], embedded.text_groups)[0]
        retrieved = [Retrieved(embedded.captions[text], bool(right[text]), float(scores[text])) for text in nearest]
        return RetrievalExample(
            image=picture(self.captioned.held_out.stored_image(owner)),
            captions=list(self.captioned.held_out.captions[owner]),
            rank=int(self.matches.ranks[image]),
            retrieved=retrieved,
        )


def _figures(direction: str, ranks: list[int]) -> dict[str, float]:
    recalls = {f"{direction}_r@{most}": sum(rank <= most for rank in ranks) / len(ranks) for most in RECALLS}
    return {**recalls, f"{direction}_median_rank": float(statistics.median(ranks))}
