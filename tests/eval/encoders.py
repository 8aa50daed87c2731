"""Small deterministic encoders and held-out shards for the tests of `eval`."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn

from eval.evaluator import EvaluationContext
from tests.data.small_shards import WordTokenizer, picture, sample, write_shard
from vlm.model.image_spec import ImageSpec

IMAGE = ImageSpec(size=16)
CONTEXT = EvaluationContext(IMAGE, WordTokenizer())
DIM = 8


class SmallEncoder(nn.Module):
    """Fixed random projections of pixels and of letters, without padding; dropout tells training from evaluation."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.pixels = nn.Parameter(torch.randn(3 * IMAGE.size**2, DIM, generator=draw))
        self.letters = nn.Parameter(torch.randn(256, DIM, generator=draw))
        self.dropout = nn.Dropout(0.5)
        self.num_forwards = {"image": 0, "text": 0}

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch dim"]:
        self.num_forwards["image"] += 1
        centred = images.float().flatten(1) / 255 - 0.5
        return nn.functional.normalize(self.dropout(centred @ self.pixels), dim=1)

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch dim"]:
        self.num_forwards["text"] += 1
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        return nn.functional.normalize(self.dropout((self.letters[tokens] * inside[:, :, None]).sum(dim=1)), dim=1)


class PointEncoder(SmallEncoder):
    """Maps everything to one point, or to what is no number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch dim"]:
        return torch.full((len(images), DIM), self.value)

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch dim"]:
        return torch.full((len(tokens), DIM), self.value)


def embed(encoder: SmallEncoder, images: Sequence[Tensor], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The embeddings in float64, one image and one text at a time."""
    encoder.eval()
    with torch.no_grad():
        image = torch.cat([encoder.encode_image(pixels[None]) for pixels in images])
        text = torch.cat([encoder.encode_text(*WordTokenizer()([words])) for words in texts])
    return image.double(), text.double()


def captioned_shard(folder: Path, captions: Sequence[Sequence[str]], broken: Sequence[int] = ()) -> str:
    """A shard of pictures with these captions; `broken` ones are no pictures."""
    samples = []
    for number, texts in enumerate(captions):
        stored = b"not a picture" if number in broken else picture(number)
        samples.append(sample(number, jpg=stored, json=json.dumps({"captions": list(texts)})))
    return str(write_shard(folder / "captioned.tar", samples))


def labelled_shard(folder: Path, labels: Sequence[int | None]) -> str:
    """A shard of pictures with these labels; None leaves the label out."""
    samples = [
        sample(number, jpg=picture(number), **({} if label is None else {"cls": label}))
        for number, label in enumerate(labels)
    ]
    return str(write_shard(folder / "labelled.tar", samples))
