"""`vlm caption`: captions of pictures or of the samples of shards, on all ranks that a launcher started."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from pydantic import ValidationError
from torch import Tensor

from data.images.views import evaluation_view
from data.loading.heldout import HeldOutSet
from data.samples.bad_sample import BadSampleError
from eval.encoder import evaluation_mode, local_range
from launch.evaluate import loaded_model
from vlm.config import first_problem
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason
from vlm.generation.captioner import Caption, CaptionGenerator
from vlm.generation.config import GenerationConfig
from vlm.model.image_spec import ImageSpec
from vlm.paths import output_file, write_output
from vlm.terminal import one_line

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
PATIENCE = 60.0  # seconds


class Captioned(NamedTuple):
    """The caption of a picture, by its file's name or its sample's key."""

    position: int
    name: str
    caption: Caption


class Batch(NamedTuple):
    """Pictures of this rank, padded to as many rows on every rank; `names` are those of the valid rows."""

    images: Tensor
    positions: Tensor
    names: list[str | None]


def generation_config(options: Mapping[str, Any]) -> GenerationConfig:
    """How captions are generated, by options of which those that are None were not given.

    Raises UserError for an impossible value, or one that means nothing with the method.
    """
    try:
        return GenerationConfig.model_validate({name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise UserError(first_problem(error, GenerationConfig)) from None


def caption_pictures(
    name: str,
    pictures: Sequence[str],
    config: GenerationConfig,
    *,
    batch_size: int = 64,
    json_file: Path | None = None,
    trust: bool = False,
    patience: float = PATIENCE,
) -> list[Captioned]:
    """Print a caption of each picture by the model called `name`, with its log-likelihood; all of them are returned.

    `pictures` are image files or shards, not both. What cannot be read is named on standard error. A caption depends on
    its picture and, where tokens are drawn, on its place among them: neither on ranks nor on batches.
    """
    json_file = None if json_file is None else output_file(json_file, "--json")
    is_files = [Path(picture).suffix.lower() in PICTURES for picture in pictures]
    if any(is_files) and not all(is_files):
        raise UserError(f"{pictures[is_files.index(False)]} is no picture ({', '.join(PICTURES)}), unlike others")
    with loaded_model(name, patience, trust=trust) as (model, world):
        generator = CaptionGenerator(model, config)
        with evaluation_mode(model):
            batches = _of_files if all(is_files) else _of_shards
            local = _local(generator, batches(pictures, model.image_spec, world, batch_size), world)
        captioned = sorted(one for rank in world.gather_objects(local) for one in rank)
        if not captioned:
            raise EveryRankError(f"{pictures[0]}{' and others' if len(pictures) > 1 else ''}: no picture can be read")
        if world.is_main:
            if json_file is not None:
                lines = [json.dumps(_as_json(one), ensure_ascii=False) + "\n" for one in captioned]
                write_output(json_file, "".join(lines), "--json")
            _print(captioned, sys.stdout)
        world.barrier()
    return captioned


def _local(generator: CaptionGenerator, batches: Iterator[Batch], world: World) -> list[Captioned]:
    """The captions of this rank's pictures, in as many forwards as any rank needs."""

    def any_rank_wants(wants: bool) -> bool:
        return bool(world.sum(torch.tensor([int(wants)], device=world.device)).item())

    captioned = []
    for images, positions, names in batches:
        world.pulse()
        captions = generator.captions(images.to(world.device), positions.to(world.device), any_rank_wants)
        for position, name, caption in zip(positions.tolist(), names, captions, strict=True):
            if name is not None:
                captioned.append(Captioned(position, name, caption))
    return captioned


def _of_files(names: Sequence[str], spec: ImageSpec, world: World, batch_size: int) -> Iterator[Batch]:
    local, most = local_range(len(names), world)
    for start in range(local.start, local.start + most, batch_size):
        positions = range(start, min(start + batch_size, local.start + most))
        views = [_view(names[place], spec) if place in local else None for place in positions]
        blank = torch.zeros(3, spec.size, spec.size, dtype=torch.uint8)
        images = torch.stack([blank if view is None else view for view in views])
        known = [None if view is None else names[place] for place, view in zip(positions, views, strict=True)]
        yield Batch(images, torch.tensor(list(positions)), known)


def _view(name: str, spec: ImageSpec) -> Tensor | None:
    """The picture as the model takes it; None, and a line on standard error, for one that cannot be read."""
    try:
        with open(name, "rb") as file:
            pixels = evaluation_view(file.read(), spec)
    except (BadSampleError, OSError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        print(one_line(f"skipped: {name}: {words}"), file=sys.stderr)
        return None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _of_shards(patterns: Sequence[str], spec: ImageSpec, world: World, batch_size: int) -> Iterator[Batch]:
    held_out = HeldOutSet(patterns, spec, where="SHARDS")
    keys = held_out.keys()
    for batch in held_out.batches(world, batch_size):
        rows = zip(batch.indices.tolist(), batch.valid.tolist(), strict=True)
        yield Batch(batch.images, batch.indices, [keys[place] if is_valid else None for place, is_valid in rows])
    for skip in held_out.skipped:
        print(one_line(f"skipped: {skip.shard} {skip.key}: {skip.reason}"), file=sys.stderr)


def _print(captioned: Sequence[Captioned], to: TextIO) -> None:
    try:
        for one in captioned:
            print(f"{one_line(one.name)}\t{one.caption.log_likelihood:.3f}\t{one_line(one.caption.text)}", file=to)
        to.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())


def _as_json(one: Captioned) -> dict[str, object]:
    return {
        "picture": one.name,
        "caption": one.caption.text,
        "log_likelihood": one.caption.log_likelihood,
        "num_tokens": one.caption.num_tokens,
    }
