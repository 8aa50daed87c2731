"""Embedding many images and texts on all ranks, every rank running the same number of equally large forwards.

Under ZeRO-3 each forward is a collective, so a rank that runs out of work goes on with padding. And because kernels
choose their order of summation by shape, every forward has `batch_size` rows and all texts one common length: an
embedding does not depend on the number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (its usual name)
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor, nn

from data.loading.held_out_images import HeldOutBatch, HeldOutImages
from vlm.distributed.world import World
from vlm.model.heads import Reading
from vlm.model.tokenizer import TokenBatch
from vlm.progress import report_progress
from vlm.training.precision import Precision


@runtime_checkable
class Encoder(Protocol):
    """A model with an image and a text tower; embeddings have unit norm."""

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The embeddings of uint8 images."""

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """The embeddings of token ids."""

    def modules(self) -> Iterator[nn.Module]:
        """The model and all modules in it."""

    def eval(self) -> Any:
        """Switch to evaluation: no dropout, no updates of statistics."""


class ImageEmbeddings(NamedTuple):
    """The usable images of a held-out set, in its order; `indices` are their positions there."""

    rows: Float32[Tensor, "images dim"]
    indices: Int64[Tensor, " images"]


@runtime_checkable
class HeadedEncoder(Encoder, Protocol):
    """An encoder with projection heads behind its towers."""

    def before_head(self) -> Encoder:
        """The same model, read before its heads."""


@contextmanager
def evaluation_mode(
    model: Encoder, embedding: Reading = "after_head", precision: Precision = "fp32"
) -> Iterator[Encoder]:
    """Evaluate without gradients in the block; afterwards each module trains, or does not, as before.

    What the block gets makes the embeddings that are asked for; a model without heads has but one kind. `precision` is
    that of the towers' products, whatever the model trains with.
    """
    reader = model.before_head() if embedding == "before_head" and isinstance(model, HeadedEncoder) else model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a tensor that a tower caches, or ZeRO-3 gathers, in there cannot be trained on afterwards.
        with torch.no_grad(), torch.autocast(_device_type(model), torch.bfloat16, enabled=precision == "bf16"):
            yield reader
    finally:
        for module, training in modes:
            module.training = training


def _device_type(model: Encoder) -> str:
    parameters = (parameter for module in model.modules() for parameter in module.parameters())
    first = next(parameters, None)
    return "cpu" if first is None else first.device.type


def embed_batches(
    model: Encoder, held_out: HeldOutImages, world: World, batch_size: int, workers: int | None
) -> Iterator[tuple[HeldOutBatch, Float32[Tensor, "batch dim"]]]:
    """This rank's batches of a held-out set with the embeddings of their images, padding and broken ones included."""
    num_local, done = len(local_range(len(held_out), world)[0]), 0
    for host_batch in held_out.batches(world, batch_size, workers):
        world.pulse()
        report_progress("images", done, num_local)
        batch = host_batch.to(world.device)
        rows = len(batch.images)
        images = F.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, batch_size - rows))
        done = min(num_local, done + rows)
        yield batch, model.encode_image(images)[:rows].float()


def embed_images(
    model: Encoder, held_out: HeldOutImages, world: World, batch_size: int, workers: int | None
) -> ImageEmbeddings:
    """All usable images of a held-out set, on every rank. Collective."""
    batches = embed_batches(model, held_out, world, batch_size, workers)
    without_pixels = [(rows, batch.indices, batch.valid) for batch, rows in batches]
    local_rows, local_indices, local_valid = (torch.cat(column) for column in zip(*without_pixels, strict=True))
    rows, indices = gather_rows(local_rows, world), gather_rows(local_indices, world)
    valid = gather_rows(local_valid.byte(), world).bool()
    return ImageEmbeddings(rows[valid], indices[valid])


def embed_texts(model: Encoder, texts: TokenBatch, world: World, batch_size: int) -> Float32[Tensor, "texts dim"]:
    """All texts, on every rank. Collective."""
    local, most = local_range(len(texts.tokens), world)
    rows = embed_local_texts(model, texts, local, most, world, batch_size)
    return gather_ranges(rows, most, len(texts.tokens), world)


def embed_local_texts(
    model: Encoder, texts: TokenBatch, local: range, most: int, world: World, batch_size: int
) -> Float32[Tensor, "local dim"]:
    """The texts in `local`, in as many forwards as `most` texts take; the rows too many are the last text again."""
    num_forwards = -(-most // batch_size)
    positions = torch.arange(local.start, local.start + num_forwards * batch_size).clamp(max=len(texts.tokens) - 1)
    rows = []
    for number, chosen in enumerate(positions.split(batch_size)):
        report_progress("texts", min(len(local), number * batch_size), len(local))
        world.pulse()
        tokens, lengths = texts.tokens[chosen].to(world.device), texts.lengths[chosen].to(world.device)
        rows.append(model.encode_text(tokens, lengths).float())
    return torch.cat(rows)[: len(local)]


def local_range(count: int, world: World) -> tuple[range, int]:
    """The places of this rank among `count` in order, and the most that any rank has: the first ranks are full."""
    most = -(-count // world.size)
    return range(min(count, world.rank * most), min(count, (world.rank + 1) * most)), most


def gather_ranges(
    rows: Float32[Tensor, "local dim"], most: int, count: int, world: World
) -> Float32[Tensor, "count dim"]:
    """The `count` rows of which each rank holds its `local_range`, on every rank. Collective."""
    return gather_rows(F.pad(rows, (0, 0, 0, most - len(rows))), world)[:count]


def gather_rows(rows: Shaped[Tensor, "rows ..."], world: World) -> Shaped[Tensor, "all_rows ..."]:
    """Every rank's rows, equally many, in rank order. Collective."""
    if world.size == 1:
        return rows
    gathered = rows.new_empty(world.size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered
