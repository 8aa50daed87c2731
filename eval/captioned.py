"""Held-out images and all their captions, embedded for retrieval and geometry."""

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eval.encoder import Encoder, embed_images, embed_texts
from eval.equal_texts import equal_tokens
from eval.evaluator import EvaluationContext
from eval.ranks import NO_GROUP
from eval.shards import CaptionedEvaluationConfig
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.evaluation import Evaluator
from vlm.model.tokenizer import TokenBatch
from vlm.skip import Skip


class Embedded(NamedTuple):
    """A whole held-out set: usable images, their captions, and for both the position of the sample they are from.

    Captions of equal tokens are one group, whichever images they are of; an image is in the groups of all its captions
    (filled up with NO_GROUP). So a caption that is word for word another image's is a right answer to both.
    """

    images: Float32[Tensor, "images dim"]
    image_owners: Int64[Tensor, " images"]
    image_groups: Int64[Tensor, "images groups"]
    texts: Float32[Tensor, "texts dim"]
    text_owners: Int64[Tensor, " texts"]
    text_groups: Int64[Tensor, "texts 1"]
    captions: tuple[str, ...]


class CaptionedEvaluator(Evaluator):
    """The base of evaluators of captioned samples: what they tell of their set."""

    _captioned: "CaptionedImages"

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines on the captions that a reader of the figures should know."""
        return self._captioned.notices

    @property
    def records(self) -> dict[str, DataRecord]:
        """The set that is measured on."""
        return {"shards": self._captioned.held_out.record}

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""
        return self._captioned.skipped


class CaptionedImages:
    """The captioned samples of held-out shards. Samples without a usable image or caption take no part.

    Raises:
        UserError: shards without captions.
    """

    def __init__(self, config: CaptionedEvaluationConfig, context: EvaluationContext) -> None:
        self._config = config
        self._tokenizer = context.tokenizer
        self._where = context.where("shards")
        self.held_out = config.held_out(context)
        if not any(self.held_out.captions):
            raise UserError(self.held_out.without("caption", "txt, or json with `captions`"))

    def embed(self, model: Encoder, world: World) -> Embedded:
        """All of them on every rank: memory grows with images plus texts, not with their product. Collective."""
        config = self._config
        images, owners = embed_images(model, self.held_out, world, config.batch_size, config.workers)
        captioned = torch.tensor([bool(captions) for captions in self.held_out.captions], device=world.device)[owners]
        images, owners = images[captioned], owners[captioned]
        if not len(images):
            raise UserError(f"{self._where}: none of the {len(self.held_out)} samples has a readable image and caption")
        texts = embed_texts(model, self._tokens, world, config.batch_size)
        text_owners = torch.tensor(self._text_owners, device=world.device)
        usable = torch.isin(text_owners, owners)
        captions = tuple(self._texts[place] for place in usable.nonzero().flatten().tolist())
        image_groups = self._sample_groups.to(world.device)[owners]
        text_groups = self._groups.to(world.device)[usable, None]
        return Embedded(images, owners, image_groups, texts[usable], text_owners[usable], text_groups, captions)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples without a usable image or caption, as far as this rank knows."""
        known = {(skip.shard, skip.key) for skip in self.held_out.skipped}
        uncaptioned = (number for number, captions in enumerate(self.held_out.captions) if not captions)
        skips = (self.held_out.skip(number, "it has no caption") for number in uncaptioned)
        return (*self.held_out.skipped, *(skip for skip in skips if (skip.shard, skip.key) not in known))

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Lines on how txt members were read, where that is in doubt, and on captions that several images have."""
        return (*self._layout_notice(), *self._sharing_notice())

    def _layout_notice(self) -> tuple[str, ...]:
        layout = self.held_out.txt_layout
        if self._config.txt is None and layout == "lines":
            words = "each line of a txt member is a caption, as in public retrieval sets; txt: whole reads it as one"
            return (f"{self._where}: {words}",)
        if layout == "mixed":
            words = "most txt members have several lines, not all: each is one caption; txt: lines reads them by line"
            return (f"{self._where}: {words}",)
        return ()

    def _sharing_notice(self) -> tuple[str, ...]:
        owners: dict[int, dict[int, int]] = {}
        for place, (group, owner) in enumerate(zip(self._groups.tolist(), self._text_owners, strict=True)):
            owners.setdefault(group, {}).setdefault(owner, place)
        shared = [places for places in owners.values() if len(places) > 1]
        if not shared:
            return ()
        keys = self.held_out.keys()
        first, second = list(shared[0])[:2]
        caption = self._texts[shared[0][first]]
        number = "1 caption is" if len(shared) == 1 else f"{len(shared):,} captions are"
        example = f"{caption[:80]!r} (samples {keys[first]}, {keys[second]})"
        more = ", ..." if len(shared) > 1 or len(shared[0]) > 2 else ""
        words = f"{number} the same for several images, each a right answer to all of them"
        return (f"{self._where}: {words}: {example}{more}",)

    @cached_property
    def _texts(self) -> list[str]:
        return [caption for captions in self.held_out.captions for caption in captions]

    @cached_property
    def _text_owners(self) -> list[int]:
        return [owner for owner, captions in enumerate(self.held_out.captions) for _ in captions]

    @cached_property
    def _groups(self) -> Int64[Tensor, " texts"]:
        return equal_tokens(self._tokens)

    @cached_property
    def _sample_groups(self) -> Int64[Tensor, "samples most"]:
        counts = [len(captions) for captions in self.held_out.captions]
        rows = self._groups.split(counts)
        return pad_sequence(list(rows), batch_first=True, padding_value=NO_GROUP)

    @cached_property
    def _tokens(self) -> TokenBatch:
        return self._tokenizer(self._texts)
