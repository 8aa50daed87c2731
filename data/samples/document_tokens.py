"""A document as a model reads it: tokens of its texts, cut to its context, and which images each of them sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from data.documents_config import DocumentsConfig
from data.samples.bad_sample import BadSampleError
from data.samples.documents import ImagePlace, Piece
from vlm.batch import Documents
from vlm.model.tokenizer import Tokenizer

_SHORTEST = 2  # tokens: two marks
_TOGETHER = 16  # texts that are tokenized at a time


class DocumentTokens(NamedTuple):
    """The tokens of one document, the images `before` each, whether it is `told`; and the suffixes of the images."""

    ids: tuple[int, ...]
    before: tuple[int, ...]
    told: tuple[bool, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class DocumentTokenizer:
    """Tokenizer of documents: each text by itself, so that any tokenizer of texts does, with marks at both ends.

    `image_text` stands at the place of each image, behind it, and is not told.
    """

    tokenizer: Tokenizer
    config: DocumentsConfig

    def __call__(self, pieces: Sequence[Piece]) -> DocumentTokens:
        """The tokens of a document, up to its context and its last text; what lies behind the cut is left out.

        Raises:
            BadSampleError: no text is left before the cut.
        """
        limit = min(self.config.max_tokens or self.tokenizer.context_length, self.tokenizer.context_length) - 1
        texts = [piece for piece in pieces if isinstance(piece, str)]
        (placed,) = self.tokenizer.inner([self.config.image_text])
        inner = chain.from_iterable(map(self.tokenizer.inner, _in_groups(texts)))  # none far behind the cut
        begin, end = self.tokenizer.marks
        ids, before, told, images = [begin], [0], [False], list[str]()
        for piece in pieces:
            if len(ids) >= limit or (isinstance(piece, ImagePlace) and len(images) == self.config.max_images):
                break
            if isinstance(piece, ImagePlace):
                images.append(piece.suffix)
            added = placed if isinstance(piece, ImagePlace) else next(inner)
            ids += added
            before += [len(images)] * len(added)
            told += [isinstance(piece, str)] * len(added)
        length = max((place + 1 for place, is_told in enumerate(told[:limit]) if is_told), default=0)
        if not length:
            raise BadSampleError(f"it has no text in its first {limit + 1} tokens and {self.config.max_images} images")
        last = before[length - 1]
        return DocumentTokens(
            ids=(*ids[:length], end),
            before=(*before[:length], last),
            told=(*told[:length], True),
            images=tuple(images[:last]),
        )

    def part(self, documents: Sequence[DocumentTokens], owners: Sequence[int]) -> Documents:
        """Several documents as a part of a batch, in which each rides along with a sample."""
        tokens, lengths = self.tokenizer.padded([one.ids for one in documents])
        if self.tokenizer.shorten and not documents:
            tokens = tokens[:, :_SHORTEST]  # beside other batches, those of no documents are not to be the longest
        told = torch.zeros(tokens.shape, dtype=torch.bool)
        seen_to = torch.zeros_like(tokens)
        for row, one in enumerate(documents):
            told[row, : len(one.ids)] = torch.tensor(one.told)
            # While a token tells the next one, it looks at the images before that one.
            seen_to[row, : len(one.ids) - 1] = torch.tensor(one.before[1:])
        one_before = (seen_to - 1).clamp(min=0)
        return Documents(
            tokens,
            lengths,
            told=told,
            seen_from=one_before if self.config.images_seen == "last" else torch.zeros_like(seen_to),
            seen_to=seen_to,
            num_images=torch.tensor([len(one.images) for one in documents], dtype=torch.int64),
            owners=torch.tensor(owners, dtype=torch.int64),
        )


def _in_groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER))
