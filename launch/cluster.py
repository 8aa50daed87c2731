"""`vlm data cluster`: samples of shards put into clusters, and groups of neighbours, by their embeddings."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.options import grouped

if TYPE_CHECKING:
    from rich.table import Table

    from data.embeddings.embedded import What
    from data.neighbours.write import ClusterJob, ClusterSummary


@dataclass(frozen=True)
class ClusterOptions:
    """What is clustered, and how."""

    clusters: Annotated[int, typer.Option(min=1, max=10**6, help="So many clusters: K.")]
    on: Annotated[str, typer.Option(help="The embeddings that are clustered: image or text.")] = "image"
    stages: Annotated[
        Path | None, typer.Option(help="Neighbours of the stage before, each of whose clusters is divided into K.")
    ] = None
    groups: Annotated[
        int | None, typer.Option(min=2, max=1024, help="Also make groups of so many mutual neighbours.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed makes the same clusters.")] = 0


@grouped
def cluster_embeddings(
    embeddings: Annotated[Path, typer.Argument(help="A folder that `vlm embed` wrote.", metavar="EMBEDDINGS")],
    out: Annotated[Path, typer.Option(help="The new folder for the neighbours.")],
    options: ClusterOptions,
) -> None:
    """Put samples into clusters by k-means, and into groups of neighbours, of which batches can be made."""
    from data.embeddings.embedded import EMBEDDINGS
    from data.embeddings.parts import open_parts
    from data.neighbours.labels import NEIGHBOURS
    from data.neighbours.write import ClusterJob
    from vlm.errors import UserError, nearest
    from vlm.paths import local_path, new_folder

    kinds: dict[str, What] = {"image": "image", "text": "text"}
    if options.on not in kinds:
        raise UserError(f"--on: unknown {options.on!r:.60}; {nearest(options.on, kinds)}")
    before = (
        None if options.stages is None else open_parts(local_path(options.stages, "--stages"), NEIGHBOURS, "--stages")
    )
    run_cluster(
        ClusterJob(
            embeddings=open_parts(local_path(embeddings, "EMBEDDINGS"), EMBEDDINGS, "EMBEDDINGS"),
            on=kinds[options.on],
            clusters=options.clusters,
            out=new_folder(out, "--out"),
            seed=options.seed,
            previous=before,
            group_size=options.groups,
        )
    )


def run_cluster(job: "ClusterJob") -> "ClusterSummary":
    """Cluster, telling how far it is, and print a table of what came out."""
    from data.neighbours.write import cluster
    from launch.shown_progress import shown_progress
    from vlm.progress import report_progress
    from vlm.terminal import Terminal

    with shown_progress():
        summary = cluster(job, partial(report_progress, "parts"))
    console = Terminal()
    console.print(_table(job, summary))
    console.print(f"clustered: {job.out}", soft_wrap=True)
    return summary


def _table(job: "ClusterJob", summary: "ClusterSummary") -> "Table":
    from rich.table import Table

    table = Table("what", title="Clusters")
    table.add_column("value", justify="right")
    sizes = sorted(summary.sizes.tolist())
    table.add_row("samples", f"{summary.num_samples:,}")
    table.add_row("clusters that are not empty", f"{len(sizes):,}")
    for name, size in (("smallest", sizes[0]), ("median", sizes[len(sizes) // 2]), ("largest", sizes[-1])):
        table.add_row(name, f"{size:,}")
    if job.group_size is not None:
        in_small = summary.num_samples % job.group_size
        table.add_row(f"groups of {job.group_size}", f"{summary.num_samples // job.group_size:,}")
        table.add_row("samples in a smaller group", f"{in_small:,}")
        table.add_row("mean cosine in a group", f"{summary.similarity:.4f}")
    if summary.left_out:
        table.add_row("without a label of the stage before", f"{summary.left_out:,}")
    return table
