"""`vlm data negatives`: captions that are almost right, mined from other samples and written into copies of shards."""

from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.options import grouped

if TYPE_CHECKING:
    from rich.table import Table

    from data.mining.folder import MinedShard
    from data.mining.mine import Miner, MiningConfig


@dataclass(frozen=True)
class MiningOptions:
    """How many captions are drawn for each, and among which."""

    count: Annotated[int, typer.Option(min=0, max=100, help="Negatives of each caption.")] = 3
    paraphrases: Annotated[int, typer.Option(min=0, max=100, help="Paraphrases of each caption.")] = 0
    candidates: Annotated[
        int, typer.Option(min=1, max=4096, help="Nearest captions of each by embedding, among which it is drawn.")
    ] = 64
    surface: Annotated[str, typer.Option(help="Likeness of texts: ngrams (of letters), edit (of words), or none.")] = (
        "ngrams"
    )
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed draws the same captions.")] = 0

    def config(self) -> "MiningConfig":
        """The same, checked."""
        from data.mining.mine import MiningConfig
        from data.mining.surface import SURFACES
        from vlm.errors import UserError, nearest

        names = {str(name): name for name in SURFACES}
        if self.surface not in names:
            raise UserError(f"--surface: unknown {self.surface!r:.60}; {nearest(self.surface, names)}")
        if not self.count and not self.paraphrases:
            raise UserError("--count: found 0, and no --paraphrases: nothing would be written")
        return MiningConfig(self.count, self.paraphrases, self.candidates, names[self.surface], self.seed)


@grouped
def mine_negatives(
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    embeddings: Annotated[Path, typer.Option(help="A folder that `vlm embed` wrote, with embeddings of text.")],
    out: Annotated[Path, typer.Option(help="The folder for copies of the shards.")],
    options: MiningOptions,
) -> None:
    """Give each sample captions of others that look like its own and mean something else, in a json field `negatives`.

    They are drawn among its nearest captions by embedding, in proportion to likeness on the surface over cosine;
    paraphrases the other way round.
    """
    from data.convert.on_ranks import require_other_files
    from data.embeddings.embedded import EMBEDDINGS
    from data.embeddings.parts import open_parts, parts_identity
    from data.filter.names import output_names
    from data.mining.corpus import read_corpus
    from data.mining.folder import JOURNAL, LEDGER, MiningFolder, write_mined
    from data.mining.mine import Miner
    from data.shards.cache import ShardCache
    from data.shards.folder_index import FolderIndex
    from data.shards.reader import ShardReader
    from data.shards.source import open_source
    from launch.shown_progress import shown_progress
    from vlm.paths import local_path, output_folder
    from vlm.progress import report_progress

    config = options.config()
    out = output_folder(out, "--out", files=(JOURNAL, LEDGER))
    parts = open_parts(local_path(embeddings, "--embeddings"), EMBEDDINGS, "--embeddings")
    cache = ShardCache()
    source = open_source("SHARDS", shards, FolderIndex(cache, "SHARDS"))
    reader, names = ShardReader(cache), output_names(source.shards)
    require_other_files(names, out)
    identity = parts_identity(parts.of_shards(source.contents, "--embeddings"))
    with shown_progress():
        corpus = read_corpus(source, reader, parts, partial(report_progress, "captions of shards"))
        miner = Miner(corpus, config)
        results = write_mined(
            MiningFolder(source, reader, names, out, identity), miner, partial(report_progress, "shards")
        )
    _print(out, source.shards, results, miner)


def _print(out: Path, shards: tuple[str, ...], results: "dict[int, MinedShard]", miner: "Miner") -> None:
    from data.convert.on_ranks import all_left_out
    from data.mining.folder import LEDGER
    from launch.evaluate import print_left_out
    from vlm.terminal import Terminal

    print_left_out(shards, all_left_out(results), out / LEDGER)
    console = Terminal()
    console.print(_table(results, miner))
    console.print(f"mined: {out}", soft_wrap=True)


def _table(results: "dict[int, MinedShard]", miner: "Miner") -> "Table":
    """Of the candidates and of what was drawn: how many, mean cosine, mean likeness of texts, mean number of words."""
    from rich.table import Table

    from data.mining.mine import Likeness

    mined = sum(one.num_mined for one in results.values())
    samples = sum(one.num_samples for one in results.values())
    table = Table("captions", title=f"Mined for {mined:,} of {samples:,} samples")
    for name in ("number", "cosine", miner.config.surface, "words"):
        table.add_column(name, justify="right")
    for what in ("candidates", *miner.config.counts):
        likeness = reduce(Likeness.plus, (one.likeness.get(what, Likeness()) for one in results.values()), Likeness())
        meaning, surface, words = likeness.means
        table.add_row(what, f"{likeness.count:,}", f"{meaning:.3f}", f"{surface:.3f}", f"{words:.1f}")
    return table
