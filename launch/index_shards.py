"""Index shards with a progress bar and say what is in them."""

from collections.abc import Sequence

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.pools.base import Workers
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex, folder_of
from data.shards.manifest import NAME
from data.shards.patterns import expand_shards
from data.shards.source import Source
from data.shards.store import is_remote
from data.shards.tar import NO_IMAGE, shown_name
from vlm.terminal import Terminal, one_line

_QUANTILES = (0.5, 0.9, 0.99)


def index_with_progress(patterns: Sequence[str], *, fresh: bool, workers: Workers) -> Source:
    """Index what the patterns name, write manifests and sidecars beside it, and print a table of what is there.

    Raises:
        UserError: a pattern matches nothing, or a shard cannot be read or indexed (a pipe).
    """
    shards = expand_shards(patterns, None, "SHARDS")
    console = Terminal()
    columns = (TextColumn("indexing shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    cache = ShardCache()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("indexing", total=None)
        index = FolderIndex(cache, "SHARDS", publish=True)
        entries = index.load_or_build(
            shards,
            fresh=fresh,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    source = Source("SHARDS", entries, index)
    console.print(_table(source, texts_alone=sum(entry.imageless or 0 for entry in entries.values())))
    # Shards in which no sample has an image are made for training on texts; in others it is a problem.
    of_texts = {name for name, entry in entries.items() if entry.imageless and not entry.samples}
    for problem in source.problems(cache):
        if problem.shard in of_texts and problem.reason.startswith(NO_IMAGE):
            continue
        line = f"left out: {problem.shard} {shown_name(problem.key)}: {problem.reason}"
        console.print(one_line(line), soft_wrap=True)
    for folder in dict.fromkeys(map(folder_of, shards)):
        where = folder if is_remote(folder) else folder or "./"
        console.print(f"index: {where}{NAME}", soft_wrap=True)
    return source


def _table(source: Source, texts_alone: int) -> Table:
    texts = source.statistics
    table = Table(title=f"{len(source.shards):,} shards")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("samples", f"{source.num_samples:,}")
    table.add_row("samples a shard, least and most", f"{source.counts.min():,} to {source.counts.max():,}")
    if texts_alone:
        table.add_row("samples of a text alone (data.images: false)", f"{texts_alone:,}")
    table.add_row("stored", f"{source.mean_bytes * len(source.shards) / 1e9:,.2f} GB")
    table.add_row("with a label", f"{texts.labelled:,}")
    if texts.documents:
        table.add_row("documents", f"{texts.documents:,}")
        table.add_row("images a document", f"{texts.document_images / texts.documents:,.2f}")
    table.add_row("captions", f"{texts.captions:,}")
    for name, count in sorted(texts.fields.items(), key=lambda item: -item[1])[:8]:
        table.add_row(f"samples with text in {name}", f"{count:,}")
    if texts.captions:
        ends = np.cumsum(texts.tokens)
        lengths = [int(np.searchsorted(ends, quantile * ends[-1])) for quantile in _QUANTILES]
        table.add_row("CLIP tokens a caption, 50 / 90 / 99 % at most", " / ".join(map(str, lengths)))
    return table
