"""The options of `vlm caption`, read before torch is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import EveryRankError


@dataclass(frozen=True)
class GenerationOptions:
    """How captions are generated; None where nothing is said."""

    method: Annotated[str | None, typer.Option(help="greedy (the default), beam, top_k, top_p or contrastive.")] = None
    max_length: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Tokens at most, the end among them; 32 by default.")
    ] = None
    min_length: Annotated[int | None, typer.Option(min=0, max=4096, help="Tokens before a caption may end.")] = None
    beams: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of beam: captions that are followed at a time.")
    ] = None
    length_penalty: Annotated[
        float | None, typer.Option(min=0, max=10, help="Of beam: power of the length to divide by.")
    ] = None
    k: Annotated[
        int | None, typer.Option("-k", min=1, max=4096, help="Of top_k and contrastive: tokens to choose among.")
    ] = None
    p: Annotated[
        float | None, typer.Option("-p", min=0, max=1, help="Of top_p: probability of the tokens to choose among.")
    ] = None
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of contrastive: weight of unlikeness; 0 is greedy.")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="Of top_k and top_p: divides the logits.")
    ] = None
    seed: Annotated[int | None, typer.Option(min=0, max=2**62, help="Of top_k and top_p.")] = None


@dataclass(frozen=True)
class CaptionOutputOptions:
    """Where captions are written back into shards; None where nothing is said."""

    out: Annotated[
        Path | None, typer.Option(help="Write copies of the shards, each sample with its caption, into this folder.")
    ] = None
    field: Annotated[
        str | None, typer.Option(help="With --out: the json field of the captions; generated_captions by default.")
    ] = None
    among_captions: Annotated[
        bool, typer.Option("--among-captions", help="With --out: let --field be captions or caption, read by itself.")
    ] = False
    min_score: Annotated[
        float | None, typer.Option(min=-1, max=1, help="With --out: the least cosine of image and caption.")
    ] = None


def require_no_output(options: CaptionOutputOptions) -> None:
    """Refuse what is said of an output where there is none."""
    given = {
        "--field": options.field is not None,
        "--among-captions": options.among_captions,
        "--min-score": options.min_score is not None,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise EveryRankError(f"{name}: means nothing without --out")
