"""What a model makes of every text under its question's image, and which questions it answers right.

Each rank reads the questions of its own images, in forwards that are equally many and equally large on every rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.loading.held_out_images import HeldOutBatch
from eval.choices.question import Questions
from eval.encoder import Encoder, local_range
from eval.equal_texts import token_rows
from eval.generative import image_without_content
from vlm.distributed.world import World
from vlm.model.dual_encoder import DualEncoder
from vlm.model.tokenizer import TokenBatch
from vlm.progress import report_progress

_NO_TEXT = -1
_AT_A_TIME = 4096  # questions whose tokens are compared


class Scores(NamedTuple):
    """The scores of each question's texts, the true one first.

    `answered` says which questions' images could be read; the scores of the others mean nothing. `present` is where a
    question has a text, `same` marks texts that the model cannot tell from the true one, their tokens being equal.
    `cosine` is that with the image, `to_mean` that with the mean of all images that are asked about, `likelihood` and
    `blind` what the decoder makes of a text under the image and under one without content; None where none is asked.
    """

    answered: Bool[Tensor, " questions"]
    present: Bool[Tensor, "questions texts"]
    same: Bool[Tensor, "questions texts"]
    cosine: Float64[Tensor, "questions texts"]
    to_mean: Float64[Tensor, "questions texts"]
    likelihood: Float64[Tensor, "questions texts"] | None
    blind: Float64[Tensor, "questions texts"] | None

    def wins(self, scores: Float64[Tensor, "questions texts"]) -> Bool[Tensor, "questions texts"]:
        """Where the true text scores more than another; a tie, or what is no number, is no win."""
        return (scores[:, :1] > scores) & ~self.same & self.present

    def right(self, scores: Float64[Tensor, "questions texts"]) -> Bool[Tensor, " questions"]:
        """Whether the true text scores more than all others of its question."""
        return (self.wins(scores) | ~self.present)[:, 1:].all(1)


class Reader:
    """Reads the texts of questions under their images. `decoder`: by the captioning decoder too, where there is one."""

    def __init__(
        self,
        questions: Questions,
        tokenizer: Callable[[Sequence[str]], TokenBatch],
        *,
        batch_size: int,
        workers: int | None,
        decoder: bool = False,
    ) -> None:
        self._questions = questions
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._workers = workers
        self._decoder = decoder
        counts = [len(question.texts) for question in questions.asked]
        self._places = pad_sequence(list(torch.arange(sum(counts)).split(counts)), True, _NO_TEXT)

    @property
    def num_same(self) -> int:
        """The questions whose true text no model can tell from another one."""
        return int(self._same.any(1).sum())

    def read(self, model: Encoder, encoder: Encoder, world: World) -> Scores:
        """The scores of all questions, on every rank; `encoder` makes the model's embeddings. Collective."""
        decoder = model if self._decoder and isinstance(model, DualEncoder) and model.decoder is not None else None
        one = _Pass(self._batch, self._texts_of, self._batch_size, encoder, decoder, world)
        chosen = sorted(self._texts_of)
        num_local, done = len(local_range(len(chosen), world)[0]), 0
        for batch in self._questions.images.batches(world, self._batch_size, self._workers, chosen):
            world.pulse()
            report_progress("images", done, num_local)
            done = min(num_local, done + len(batch.images))
            one.read(batch.to(world.device))
        return one.scores(self._places, self._same)

    @cached_property
    def _batch(self) -> TokenBatch:
        return self._tokenizer([text for question in self._questions.asked for text in question.texts])

    @cached_property
    def _same(self) -> Bool[Tensor, "questions texts"]:
        rows = token_rows(self._batch)
        parts = self._places.split(_AT_A_TIME)
        equal = torch.cat([(rows[places] == rows[places[:, :1]]).all(2) for places in parts])
        equal &= self._places != _NO_TEXT
        equal[:, 0] = False
        return equal

    @cached_property
    def _texts_of(self) -> dict[int, list[int]]:
        """The texts that are read under each image, in the row of all texts."""
        texts: dict[int, list[int]] = {}
        for question, places in zip(self._questions.asked, self._places.tolist(), strict=True):
            texts.setdefault(question.image, []).extend(places[: len(question.texts)])
        return texts


class _Pass:
    """One reading of all texts: what this rank has found so far."""

    def __init__(
        self,
        texts: TokenBatch,
        texts_of: Mapping[int, Sequence[int]],
        rows: int,
        encoder: Encoder,
        decoder: DualEncoder | None,
        world: World,
    ) -> None:
        self._texts = texts
        self._texts_of = texts_of
        self._rows = rows
        self._encoder = encoder
        self._decoder = decoder
        self._world = world
        self._longest = int(texts.lengths.max())
        # A row a text: whether it was read, cosine with its image and with the mean image, likelihood, and blind.
        self._found = torch.zeros(5, len(texts.lengths), dtype=torch.float64, device=world.device)
        self._text_rows: list[tuple[Int64[Tensor, " some"], Float32[Tensor, "some dim"]]] = []
        self._image_sum: Float64[Tensor, " dim1"] | None = None
        self._blind = None if decoder is None else self._blind_tokens(decoder)

    def _blind_tokens(self, decoder: DualEncoder) -> Float[Tensor, "batch image_tokens width"]:
        image = image_without_content(decoder.image_spec, self._world.device)
        return decoder.encode_image_and_tokens(image.expand(self._rows, -1, -1, -1))[1]

    def read(self, batch: HeldOutBatch) -> None:
        """Read the texts of a batch's images. Collective."""
        images = F.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, self._rows - len(batch.images)))
        embedded = self._encoder.encode_image(images).float()
        usable = batch.valid.nonzero().flatten()
        total = F.pad(embedded[usable].double().sum(0), (0, 1), value=len(usable))
        self._image_sum = total if self._image_sum is None else self._image_sum + total
        shown = None if self._decoder is None else self._decoder.encode_image_and_tokens(images)[1]
        for texts, rows, count in self._portions(batch, usable.tolist()):
            self._world.pulse()
            tokens, lengths = (part[texts].to(self._world.device) for part in self._texts)
            made = self._encoder.encode_text(tokens, lengths).float()
            here = texts[:count].to(self._world.device)
            cosines = (embedded[rows].double() * made.double()).sum(1).float().double()
            self._found[:2, here] = torch.stack([torch.ones_like(cosines), cosines])[:, :count]
            self._text_rows.append((here, made[:count]))
            if self._decoder is not None and shown is not None and self._blind is not None:
                states = self._decoder.encode_text_and_states(tokens, lengths)[1][:, : self._longest]
                for place, seen in ((3, shown[rows]), (4, self._blind)):
                    read = self._decoder.likelihood_of_states(seen, states, tokens[:, : self._longest], lengths)
                    self._found[place, here] = read[:count].double()

    def _portions(
        self, batch: HeldOutBatch, usable: Sequence[int]
    ) -> Iterator[tuple[Int64[Tensor, " rows"], Int64[Tensor, " rows"], int]]:
        """The texts of a batch's images in equal portions, as many on every rank. Collective.

        Each is the texts, the rows of their images, and how many count; the rest is the last one again.
        """
        numbers = batch.indices.tolist()
        pairs = [(text, row) for row in usable for text in self._texts_of[numbers[row]]]
        most = max(self._world.gather_objects(-(-len(pairs) // self._rows)))
        table = torch.tensor(pairs or [(0, 0)])
        for start in range(0, most * self._rows, self._rows):
            rows = torch.arange(start, start + self._rows).clamp(max=len(table) - 1)
            texts, images = table[rows].T
            yield texts, images.to(self._world.device), min(self._rows, max(0, len(pairs) - start))

    def scores(self, places: Int64[Tensor, "questions texts"], same: Bool[Tensor, "questions texts"]) -> Scores:
        """What all ranks have found, by question. Collective."""
        assert self._image_sum is not None  # every rank has a batch
        total = self._world.sum(self._image_sum)
        mean = total[:-1] / total[-1]
        for texts, rows in self._text_rows:
            self._found[2, texts] = (rows.double() @ mean).float().double()
        found = self._world.sum(self._found).cpu()
        read, cosine, to_mean, likelihood, blind = found[:, places.clamp(min=0)]
        return Scores(
            answered=read[:, 0] > 0,
            present=places != _NO_TEXT,
            same=same,
            cosine=cosine,
            to_mean=to_mean,
            likelihood=None if self._decoder is None else likelihood,
            blind=None if self._decoder is None else blind,
        )
