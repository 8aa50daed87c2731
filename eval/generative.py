"""Generative zero-shot classification: an image is of the class whose prompt its captioning decoder finds likeliest."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from jaxtyping import Float, Float64, Int64, UInt8
from pydantic import Field
from torch import Tensor

from data.loading.held_out_images import HeldOutBatch
from eval.encoder import Encoder, evaluation_mode, local_range
from eval.equal_texts import equal_tokens
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.labelled import LabelledEvaluationConfig, LabelledEvaluator
from eval.metrics import GENERATIVE_ZERO_SHOT
from eval.ranks import in_common_group
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.evaluation import Evaluation
from vlm.model.dual_encoder import DualEncoder
from vlm.model.image_spec import ImageSpec
from vlm.progress import report_progress

_TILE_TOKENS = 2**14  # that the decoder reads at a time, about
_TILE_IMAGES = (8, 64)  # of a tile, at least and at most, where a batch has so many
Normalisation = Literal["total", "token", "prior"]


@EVALUATORS.register("generative_zeroshot")
class GenerativeZeroShotConfig(LabelledEvaluationConfig):
    """Zero-shot classification of labelled shards by the likelihood of prompts under the captioning decoder."""

    kind: Annotated[Literal["generative_zeroshot"], Field(description="classes by the likelihood of their prompts")]
    normalise: Annotated[
        Normalisation,
        Field(
            description="What of a prompt's log-likelihood is compared: all of it (total), its mean over tokens "
            "(token), or how far it is above that under an image without content (prior)."
        ),
    ] = "total"

    def build(self, context: EvaluationContext) -> "GenerativeZeroShot":
        """See `GenerativeZeroShot`."""
        return GenerativeZeroShot(self, context)


class Prompts(NamedTuple):
    """Different prompts, short ones first: tokens, lengths, states; and for each class and template which of them."""

    tokens: Int64[Tensor, "prompts length"]
    lengths: Int64[Tensor, " prompts"]
    states: Float[Tensor, "prompts length width"]
    places: Int64[Tensor, "classes templates"]


class GenerativeZeroShot(LabelledEvaluator):
    """The share of images whose class is the likeliest: p(class | image) is the mean over its prompts' likelihoods.

    A prompt's likelihood is exp(l), l the decoder's log-likelihood of its tokens and its end; with `token`, exp(l / n)
    of n tokens, so that a long name is not punished; with `prior`, the class's is divided by the same under an image
    without content, all of its pixels the mean that the image tower subtracts: log p(class | image) - log p(class) is
    the pointwise mutual information, so that a name is not preferred for being common (VisualGPTScore: Lin et al.,
    2024). That image belongs to the model, so no figure depends on which other images are classified. `total` was right
    most often on rendered scenes (benchmarks/captions). Top-5 is the share of images with fewer than five classes as
    likely as their own.

    The text tower reads each prompt once, the image tower each image once, and the decoder every pair of them, as many
    on every rank.
    """

    metrics = GENERATIVE_ZERO_SHOT

    def __init__(self, config: GenerativeZeroShotConfig, context: EvaluationContext) -> None:
        super().__init__(config, context)
        self._config = config
        self._kind = context.where("kind")

    def require(self, model: Encoder) -> None:
        """Raise UserError for a model without decoder."""
        if not isinstance(model, DualEncoder) or model.decoder is None:
            raise EveryRankError(f"{self._kind}: the model has no captioning decoder (model.captioner)")

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Classify all images. Collective."""
        assert isinstance(model, DualEncoder)
        counts = torch.zeros(3, len(self._classes.names), dtype=torch.int64, device=world.device)
        num_local, done = len(local_range(len(self._held_out), world)[0]), 0
        with evaluation_mode(model, precision=self._config.precision):
            prompts = self._prompts(model, world)
            prior = self._prior(model, prompts, world)
            for batch in self._held_out.batches(world, self._config.batch_size, self._config.workers):
                report_progress("images", done, num_local)
                done = min(num_local, done + len(batch.images))
                counts += self._of_batch(model, batch.to(world.device), prompts, prior, world)
        return Evaluation(self._figures(world.sum(counts).double()))

    def _of_batch(
        self, model: DualEncoder, batch: HeldOutBatch, prompts: Prompts, prior: Tensor | None, world: World
    ) -> Int64[Tensor, "3 classes"]:
        assert batch.labels is not None  # the constructor refused a set without
        scores = self._scores(model, batch.images, prompts, world)[batch.valid]
        labels = batch.labels[batch.valid]
        return self._counts(class_ranks(scores if prior is None else scores - prior, *self._groups(labels)), labels)

    def _scores(
        self, model: DualEncoder, images: Tensor, prompts: Prompts, world: World
    ) -> Float64[Tensor, "images classes"]:
        """The log of each class's likelihood, not yet over its prior."""
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self._config.batch_size - len(images)))
        tokens = model.encode_image_and_tokens(padded)[1][: len(images)]
        likelihoods = prompt_likelihoods(model, tokens, prompts, self._config.batch_size, world)
        if self._config.normalise == "token":
            likelihoods /= prompts.lengths - 1
        return class_likelihoods(likelihoods, prompts.places)

    def _prior(self, model: DualEncoder, prompts: Prompts, world: World) -> Float64[Tensor, " classes"] | None:
        if self._config.normalise != "prior":
            return None
        return self._scores(model, image_without_content(model.image_spec, world.device), prompts, world)[0]

    def _prompts(self, model: DualEncoder, world: World) -> Prompts:
        """The prompts and their states; every rank reads all of them, in forwards of equal size."""
        batch = self._tokenizer(self._classes.prompts())
        firsts, places = equal_tokens(batch).unique(return_inverse=True)
        order = batch.lengths[firsts].argsort(stable=True)
        tokens, lengths = batch.tokens[firsts[order]].to(world.device), batch.lengths[firsts[order]].to(world.device)
        rows = torch.arange(-(-len(order) // self._config.batch_size) * self._config.batch_size).clamp(
            max=len(order) - 1
        )
        longest = int(lengths.max())
        states = []
        for chosen in rows.split(self._config.batch_size):
            world.pulse()
            states.append(model.encode_text_and_states(tokens[chosen], lengths[chosen])[1][:, :longest])
        by_class = order.argsort()[places].reshape(len(self._classes.names), -1)
        return Prompts(tokens[:, :longest], lengths, torch.cat(states)[: len(order)], by_class.to(world.device))


def image_without_content(spec: ImageSpec, device: torch.device) -> UInt8[Tensor, "1 3 size size"]:
    """An image all of whose pixels are the mean that the image tower subtracts."""
    mean = (torch.tensor(spec.mean, device=device) * 255).round().to(torch.uint8)
    return mean[None, :, None, None].expand(1, 3, spec.size, spec.size)


def prompt_likelihoods(
    model: DualEncoder,
    image_tokens: Float[Tensor, "images image_tokens width"],
    prompts: Prompts,
    batch_size: int,
    world: World,
) -> Float64[Tensor, "images prompts"]:
    """The log-likelihood of every prompt under every image, in tiles of bounded size.

    There are `batch_size` images at most. The tiles' shapes depend on it and on the prompts alone: what is missing in
    the last tile is the last image, or prompt, again.
    """
    num_images, num_prompts = len(image_tokens), len(prompts.lengths)
    pairs, (fewest, most) = _TILE_TOKENS // prompts.tokens.shape[1], (min(batch_size, most) for most in _TILE_IMAGES)
    wide = min(num_prompts, max(1, pairs // fewest))
    high = min(most, max(fewest, pairs // wide))
    rows, columns = (_filled(count, size) for count, size in ((num_images, high), (num_prompts, wide)))
    made = torch.empty(len(rows), len(columns), dtype=torch.float64, device=image_tokens.device)
    for row, chosen_rows in enumerate(rows.split(high)):
        world.pulse()
        images = image_tokens[chosen_rows]
        for column, chosen in enumerate(columns.split(wide)):
            lengths = prompts.lengths[chosen]
            longest = int(lengths.max())
            states, tokens = (part[chosen, :longest] for part in (prompts.states, prompts.tokens))
            tile = model.likelihood_of_states(
                images, states.repeat(high, 1, 1), tokens.repeat(high, 1), lengths.repeat(high)
            )
            made[row * high : (row + 1) * high, column * wide : (column + 1) * wide] = tile.view(high, wide)
    return made[:num_images, :num_prompts]


def class_likelihoods(
    likelihoods: Float64[Tensor, "images prompts"], places: Int64[Tensor, "classes templates"]
) -> Float64[Tensor, "images classes"]:
    """log(mean over templates of exp l) of each class."""
    return likelihoods[:, places].logsumexp(2) - math.log(places.shape[1])


def class_ranks(
    scores: Float64[Tensor, "images classes"],
    groups: Int64[Tensor, "images 1"],
    class_groups: Int64[Tensor, "classes 1"],
) -> Int64[Tensor, " images"]:
    """The place of each image's class, 1 where its score is the highest; what ties, or is no number, stands before."""
    is_right = in_common_group(groups, class_groups)
    own = scores.masked_fill(~is_right, -torch.inf).amax(1)
    return 1 + (~(scores < own[:, None]) & ~is_right).sum(1)


def _filled(count: int, size: int) -> Int64[Tensor, " places"]:
    """The places 0 to `count`, and the last one again up to a multiple of `size`."""
    return torch.arange(-(-count // size) * size).clamp(max=count - 1)
