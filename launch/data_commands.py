"""The `vlm data` commands: thin, with the programs behind them."""

from pathlib import Path
from typing import Annotated

import typer

from launch.check_shards import check
from launch.cluster import cluster_embeddings
from launch.counting_options import BalanceOptions, DetectionOptions
from launch.filter_shards import filter_noisy
from launch.mine import mine_negatives
from launch.options import grouped
from launch.pool_options import WorkerOptions, work_for

data_app = typer.Typer(
    help="Build, index, check, filter, cluster and count in webdataset shards.", no_args_is_help=True
)
data_app.command(name="check")(check)
data_app.command(name="filter")(filter_noisy)
data_app.command(name="cluster")(cluster_embeddings)
data_app.command(name="negatives")(mine_negatives)


@data_app.command()
@grouped
def index(
    shards: Annotated[
        list[str], typer.Argument(help="Shards: names, URLs, {00..03} and * patterns.", metavar="SHARDS...")
    ],
    where: WorkerOptions,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not believe an index that is there.")] = False,
) -> None:
    """Write a manifest per folder and a small index beside each shard, so that runs start at once."""
    from launch.index_shards import index_with_progress

    with where.open() as workers:
        index_with_progress(shards, fresh=fresh, workers=workers)


@data_app.command(name="build")
@grouped
def build(  # noqa: PLR0913 - the options of the command line
    source: Annotated[
        str,
        typer.Argument(
            help="A table (.csv, .tsv, .txt, .jsonl, .parquet), COCO captions (.json), a folder of images or Parquet."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write shards to.", metavar="OUT_DIR")],
    where: WorkerOptions,
    root: Annotated[Path | None, typer.Option(help="Where image paths start; default: the table's folder.")] = None,
    captions: Annotated[Path | None, typer.Option(help="The captions of a folder of images; else .txt beside.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image paths or bytes.")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="Column of captions; repeatable.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of class numbers, or of class names.")] = None,
    class_folders: Annotated[bool, typer.Option("--class-folders", help="Each folder of images is a class.")] = False,
    classes: Annotated[
        str | None, typer.Option(help="Class names by number (.json, .txt); else sorted.", metavar="FILE")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, max=65_535, help="Pixels of the shorter side at most.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality at most; else bytes stay.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, max=10**7, help="Samples in a shard.")] = 1000,
    prefix: Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")] = "shard",
    shuffle: Annotated[
        int,
        typer.Option(min=-(2**62), max=2**62, help="Seed of the order, which makes any first shards a fair sample."),
    ] = 0,
    in_order: Annotated[bool, typer.Option("--in-order", help="Keep the order of the table instead.")] = False,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="More left out than this is an error.")] = 0.01,
) -> None:
    """Build webdataset shards from a table, COCO captions or an image folder; the same command goes on after a kill."""
    from data.convert.builder import BuildOptions
    from data.convert.columns import ColumnOptions
    from data.convert.source import BuildSource
    from launch.build_shards import build_with_progress

    columns = ColumnOptions(image_column, tuple(caption_column or ()), label_column)
    options = BuildOptions(
        samples_per_shard=samples_per_shard,
        prefix=prefix,
        size=size,
        quality=quality,
        shuffle=None if in_order else shuffle,
        max_bad_share=max_bad_share,
    )
    built = BuildSource(source, root, captions, columns, class_folders, classes)
    with where.open() as workers:
        build_with_progress(built, folder, options, workers)


@data_app.command()
@grouped
def counting(
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    detection: DetectionOptions,
    balance: BalanceOptions,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Write the samples whose captions name one number, two to ten, of which as many objects are seen. On all ranks."""
    from launch.counting_set import make_counting_set

    make_counting_set(shards, detection, balance, json_file)


@data_app.command()
def scenes(
    folder: Annotated[Path, typer.Argument(help="The folder to write shards to.", metavar="DIR")],
    train_samples: Annotated[int, typer.Option("--train", min=1, max=10**9, help="Training scenes.")] = 20_000,
    val_samples: Annotated[int, typer.Option("--val", min=1, max=10**9, help="Validation scenes.")] = 2_000,
    seed: Annotated[int, typer.Option(min=-(2**62), max=2**62, help="The same seed renders the same scenes.")] = 0,
    image_size: Annotated[int, typer.Option(min=32, max=4096, help="Pixels a side.")] = 64,
) -> None:
    """Render scenes of coloured shapes with captions, and held-out sets for each evaluation."""
    from launch.scenes import render_scenes

    render_scenes(folder, train=train_samples, val=val_samples, seed=seed, image_size=image_size)


@data_app.command(hidden=True)
def worker(
    address: Annotated[
        str, typer.Argument(help="Where the command listens that wants work done.", metavar="HOST:PORT")
    ],
    key: Annotated[str, typer.Option(help="The file with its key.")],
) -> None:
    """Do the jobs of a command that was started with --on slurm, until none is left."""
    work_for(address, key)
