"""The commands on trained models: thin, with the programs behind them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.caption_options import CaptionOutputOptions, GenerationOptions, require_no_output
from launch.eval_commands import ModelName, TrustModel, TxtMembers
from launch.options import grouped
from launch.pool_options import PlaceOptions
from vlm.errors import UserError
from vlm.imports import fast_imports


@grouped
def caption(
    model: ModelName,
    pictures: Annotated[list[str], typer.Argument(help="Image files, or shards.", metavar="IMAGES...|SHARDS...")],
    generation: GenerationOptions,
    output: CaptionOutputOptions,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**16, help="Pictures a forward; no caption depends on it.")
    ] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a line of JSON each to this file.")
    ] = None,
    trust: TrustModel = False,
) -> None:
    """Print a caption of each picture with its log-likelihood, or write shards with them (--out). On all ranks."""
    with fast_imports():
        from launch.caption import caption_pictures, generation_config

    config = generation_config(asdict(generation))
    if output.out is None:
        require_no_output(output)
        caption_pictures(model, pictures, config, batch_size=batch_size, json_file=json_file, trust=trust)
        return
    with fast_imports():
        from launch.caption_shards import caption_shards

    caption_shards(model, pictures, config, output, batch_size=batch_size, json_file=json_file, trust=trust)


@grouped
def embed(  # noqa: PLR0913 - the options of the command line
    model: ModelName,
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    out: Annotated[Path, typer.Option(help="The folder for the embeddings, a Parquet file a shard.")],
    place: PlaceOptions,
    what: Annotated[str, typer.Option(help="image, text, or both; a sample needs all of it.")] = "image,text",
    texts: Annotated[str, typer.Option(help="first: of several captions the first; or all.")] = "first",
    txt: Annotated[str, typer.Option(help="A txt member is one caption (whole), or one a line (lines).")] = "whole",
    stored: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    precision: Annotated[str, typer.Option(help="Of the towers' products: fp32 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, max=2**16, help="Samples held ready; no byte depends on it.")] = 256,
    workers: Annotated[int, typer.Option(min=1, max=512, help="Threads of each rank that decode images.")] = 4,
    processes: Annotated[
        int | None, typer.Option(min=1, max=4096, help="With --on ray or slurm: processes at most.")
    ] = None,
    trust: TrustModel = False,
) -> None:
    """Write the embeddings of the samples of shards; the same command goes on after a kill. On all ranks."""
    with fast_imports():
        from launch.embed import embed_config, embed_shards

    config = embed_config(what, texts, txt, stored, precision)
    if place.on != "local":
        from launch.embed_pool import EmbedPlan, embed_on

        with place.start(processes, gpu=True) as pool:
            embed_on(pool, EmbedPlan(model, tuple(shards), config, out, batch_size, workers, trust=trust))
        return
    place.require_taken()
    if processes is not None:
        raise UserError("--processes: an option of --on ray and slurm; on local it is the launcher that starts ranks")
    embed_shards(model, shards, config, out, batch_size=batch_size, workers=workers, trust=trust)


def gap(
    model: ModelName,
    shards: Annotated[list[str], typer.Argument(help="Shards of captioned images.", metavar="SHARDS...")],
    out: Annotated[Path, typer.Option(help="Write the statistics to this file.")],
    batch_size: Annotated[int, typer.Option(min=1, max=2**20, help="Rows a forward; no figure depends on it.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, max=10**12, help="Only the first so many samples.")] = None,
    txt: TxtMembers = None,
    trust: TrustModel = False,
) -> None:
    """Measure what a model's images and texts differ by: `statistics` of model.captioner.gap. On all ranks."""
    with fast_imports():
        from launch.gap import captioned_images, write_gap

    config = captioned_images(shards, batch_size=batch_size, limit=limit, txt=txt)
    write_gap(model, config, out, trust=trust)


def export(
    checkpoint: ModelName,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DIR")],
    to: Annotated[str, typer.Option(help="open_clip, or your own as package.module:Class.", metavar="FORMAT")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Check the parity on the first samples of these shards, not on drawn pictures."),
    ] = None,
    before_head: Annotated[bool, typer.Option("--before-head", help="Leave out the projection heads.")] = False,
    without_decoder: Annotated[
        bool, typer.Option("--without-decoder", help="Leave out the captioning decoder.")
    ] = False,
    trust: TrustModel = False,
) -> None:
    """Write a checkpoint in another system's format and check, with that system, that it computes the same."""
    with fast_imports():
        from launch.export import export_model

    options = {"before_head": before_head, "without_decoder": without_decoder, "trust": trust}
    parity = export_model(checkpoint, to, folder, data or (), **options)
    print(f"exported to {folder}")
    print(
        f"parity with {to} in fp32: images differ by at most {parity.image:.1e} ({parity.num_images} checked), "
        f"texts by {parity.text:.1e} ({parity.num_texts} checked)"
        + ("" if parity.likelihood is None else f", log-likelihoods of tokens by {parity.likelihood:.1e}")
    )


def join(
    models: Annotated[
        list[str], typer.Argument(help="Runs, checkpoints or models, two or more.", metavar="RUN RUN...")
    ],
    out: Annotated[Path, typer.Option(help="The new folder for the joined checkpoint.")],
    trust: TrustModel = False,
) -> None:
    """Put trained models side by side into one checkpoint, whose similarity is the mean of their cosines."""
    with fast_imports():
        from launch.join import join_models

    joined = join_models(models, out, trust=trust)
    print(f"joined: {out} ({len(models)} models, {joined.embed_dim} dimensions)")
