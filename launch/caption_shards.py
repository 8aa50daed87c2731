"""`vlm caption --out`: captions written back into copies of shards, on all ranks that a launcher started."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from data.check.samples import FindingError, StoredSample, hash64
from data.convert.on_ranks import require_other_files, require_same_shards
from data.filter.names import output_names
from data.generated.fields import FIELD, CaptionField, GeneratedCaption, Origin
from data.generated.folder import JOURNAL, LEDGER, CaptionFolder, CaptionSummary, write_captions
from data.images.views import evaluation_view
from data.samples.bad_sample import BadSampleError
from data.shards.patterns import expand_shards, require_no_command
from eval.encoder import evaluation_mode
from launch.caption import PATIENCE, PICTURES
from launch.caption_options import CaptionOutputOptions
from launch.evaluate import loaded_model, print_left_out
from launch.shown_progress import shown_progress
from vlm.errors import EveryRankError, reason
from vlm.generation.captioner import CaptionGenerator
from vlm.generation.config import GenerationConfig
from vlm.generation.scoring import score_texts
from vlm.model.dual_encoder import DualEncoder
from vlm.model.identity import weights_identity
from vlm.paths import output_file, output_folder, write_output
from vlm.progress import report_progress
from vlm.terminal import Terminal

_ROWS = 32
_DIGITS = 4


def caption_shards(
    name: str,
    patterns: Sequence[str],
    config: GenerationConfig,
    output: CaptionOutputOptions,
    *,
    batch_size: int = 64,
    json_file: Path | None = None,
    trust: bool = False,
) -> CaptionSummary:
    """Write copies of shards whose samples have a caption by the model called `name` more, and print a table.

    The same command goes on after a kill. What got no caption is named on standard error, and all of it in the
    folder's ledger. Raises UserError for what cannot be done.
    """
    assert output.out is not None
    json_file = None if json_file is None else output_file(json_file, "--json")
    picture = next((one for one in patterns if Path(one).suffix.lower() in PICTURES), None)
    if picture is not None:
        raise EveryRankError(f"--out: {picture} is a picture; captions are written back into shards only")
    field = CaptionField(output.field or FIELD, output.among_captions)
    names = output_names(sorted(expand_shards(patterns, None, "SHARDS")))
    require_no_command(tuple(names), "SHARDS")
    out = output_folder(output.out, "--out", files=(JOURNAL, LEDGER))
    require_other_files(names, out)
    with loaded_model(name, PATIENCE, trust=trust) as (model, world):
        require_same_shards(tuple(names.values()), world)
        generator = CaptionGenerator(model, config)
        origin = Origin(weights_identity(model), generator.options)
        captioner = ShardCaptioner(model, generator, batch_size)
        folder = CaptionFolder(names, out, field, origin, output.min_score, captioner.together)
        with evaluation_mode(model), shown_progress(is_main=world.is_main):
            report = partial(report_progress, "shards")
            summary = write_captions(folder, captioner, world, report)
        if world.is_main:
            _write_json(folder, json_file)
            _print(folder, summary)
        world.barrier()
    return summary


class _Tile(NamedTuple):
    """Samples whose positions in their shard are one multiple of `_ROWS` and less than the next, and their images.

    `rows` are the samples' places among all of them; the other rows are blank.
    """

    rows: list[int]
    embedding: Tensor
    tokens: Tensor


class ShardCaptioner:
    """Captions of a shard's samples with their scores, the same bit for bit whatever else is captioned with them.

    Kernels choose their order of summation by shape, so images and captions go through the towers in tiles of rows that
    depend on the shard alone. Only the choice of the next token is made for `batch_size` captions at a time: it could
    differ where two tokens are equally likely to the last bit.
    """

    def __init__(self, model: DualEncoder, generator: CaptionGenerator, batch_size: int) -> None:
        self._model = model
        self._generator = generator
        self._batch_size = batch_size
        self.together = _ROWS * -(-batch_size // _ROWS)

    def __call__(self, samples: Sequence[StoredSample]) -> list[GeneratedCaption | str]:
        """The caption of each of some samples, or why it has none."""
        views = [self._view(sample) for sample in samples]
        read = [(sample, view) for sample, view in zip(samples, views, strict=True) if isinstance(view, Tensor)]
        captions = iter(self._captions([sample for sample, _ in read], [view for _, view in read]))
        if samples:
            report_progress("samples of this shard", samples[-1].position + 1, len(samples[-1].shard))
        return [view if isinstance(view, str) else next(captions) for view in views]

    def _view(self, sample: StoredSample) -> Tensor | str:
        """The picture as the model takes it, or why it cannot be had."""
        try:
            pixels = evaluation_view(sample.image(), self._model.image_spec)
        except (FindingError, BadSampleError, OSError) as error:
            return reason(error)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def _captions(self, samples: Sequence[StoredSample], views: Sequence[Tensor]) -> Iterator[GeneratedCaption | str]:
        if not samples:
            return
        tiles = list(self._tiles(samples, views))
        tokens = torch.cat([tile.tokens[tile.rows] for tile in tiles])
        texts = iter(self._texts(samples, tokens))
        for tile in tiles:
            by_row = {row: next(texts) for row in tile.rows}
            of_tile = [by_row.get(row, "") for row in range(_ROWS)]
            scores = score_texts(self._model, tile.embedding, tile.tokens, of_tile)
            for row, text in by_row.items():
                likelihood, num_tokens, cosine = scores[row]
                if not text:
                    yield "the model wrote no word"
                elif not math.isfinite(likelihood) or not math.isfinite(cosine):
                    yield "the likelihood or the cosine of its caption is no number"
                else:
                    yield GeneratedCaption(text, round(likelihood, _DIGITS), num_tokens, round(cosine, _DIGITS))

    @torch.no_grad()
    def _tiles(self, samples: Sequence[StoredSample], views: Sequence[Tensor]) -> Iterator[_Tile]:
        device = self._model.logit_scale.device
        for number in dict.fromkeys(sample.position // _ROWS for sample in samples):
            inside = [place for place, sample in enumerate(samples) if sample.position // _ROWS == number]
            rows = [samples[place].position % _ROWS for place in inside]
            images = views[0].new_zeros(_ROWS, *views[0].shape)
            images[rows] = torch.stack([views[place] for place in inside])
            yield _Tile(rows, *self._model.encode_image_and_tokens(images.to(device)))

    def _texts(self, samples: Sequence[StoredSample], tokens: Tensor) -> Iterator[str]:
        ids = [hash64(sample.key.encode("utf-8", "surrogatepass")) >> 1 for sample in samples]
        all_ids = torch.tensor(ids, device=tokens.device)
        for some_tokens, some_ids in zip(tokens.split(self._batch_size), all_ids.split(self._batch_size), strict=True):
            for caption in self._generator.captions_of(some_tokens, some_ids):
                yield caption.text


def _write_json(folder: CaptionFolder, json_file: Path | None) -> None:
    if json_file is None:
        return
    lines = [
        {
            "picture": name,
            "caption": one.text,
            "log_likelihood": one.log_likelihood,
            "num_tokens": one.num_tokens,
            "cosine": one.cosine,
        }
        for name, one in folder.captions()
    ]
    write_output(json_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "--json")


def _print(folder: CaptionFolder, summary: CaptionSummary) -> None:
    print_left_out(folder.shards, summary.left_out, folder.out / LEDGER)
    table = Table("what", title="Captions")
    table.add_column("value", justify="right")
    table.add_row("shards", f"{len(summary.shards):,}")
    table.add_row("samples", f"{summary.num_samples:,}")
    table.add_row(f"captions in {folder.field.name}", f"{summary.num_captions:,}")
    if folder.min_score is not None:
        table.add_row(f"left out, cosine below {folder.min_score:g}", f"{summary.num_below:,}")
    table.add_row("skipped", f"{len(summary.left_out):,}")
    console = Terminal()
    console.print(table)
    console.print(f"captioned: {folder.out}", soft_wrap=True)
