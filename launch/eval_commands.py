"""The `vlm eval` commands: thin, one a kind of evaluator, and one for a class of the user's own."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_OWN = "package.module:Class"

ModelName = Annotated[
    str, typer.Argument(help="A checkpoint, a run directory, or MODEL[:TAG] of open_clip.", metavar="CHECKPOINT|MODEL")
]
TrustModel = Annotated[
    bool, typer.Option("--trust", help="Follow the names of other files that stand in the checkpoint or folder.")
]
Keys = Annotated[
    list[str] | None,
    typer.Argument(help="Any key of the evaluator, as in a recipe: workers=4.", metavar="[KEY=VALUE]..."),
]
DataPattern = Annotated[list[str], typer.Option("--data", help="Shards: names, {00..03} and * patterns; repeatable.")]
OwnData = Annotated[
    list[str] | None, typer.Option("--data", help="Its `shards`: names, {00..03} and * patterns; repeatable.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=2**20, help="Rows a forward, 256 by default; no figure depends on it.")
]
TxtMembers = Annotated[
    str | None, typer.Option(help='Of a txt member: "whole", "lines" (a caption each), or by the set\'s layout.')
]
Limit = Annotated[int | None, typer.Option(min=1, max=10**12, help="Only the first so many samples.")]
Shifts = Annotated[
    list[float] | None,
    typer.Option(
        "--shift", min=-100, max=100, help="Move images and texts together by this share of their gap; repeatable."
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="Of the towers' products: fp32 (the default) or bf16, as in recipes.")
]
BeforeHead = Annotated[bool, typer.Option("--before-head", help="Read embeddings before the projection heads.")]
Patience = Annotated[float, typer.Option(min=1, max=86_400, help="Seconds of silence after which a rank is given up.")]
Plots = Annotated[Path | None, typer.Option(help="Draw what the evaluator has to show into this folder.")]


class _Kinds(TyperGroup):
    """Commands by the kind of evaluator; a word with a colon is the class of one's own."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        own = bool(args) and ":" in args[0] and not args[0].startswith("-")
        return super().resolve_command(ctx, [_OWN, *args] if own else args)


eval_app = typer.Typer(cls=_Kinds, help="Measure a checkpoint, a run, or an open_clip model.", no_args_is_help=True)


@eval_app.command()
def zeroshot(  # noqa: PLR0913 - the options of the command line
    model: ModelName,
    data: DataPattern,
    classes: Annotated[str, typer.Option(help="JSON file of class names, or the name of a known list.")],
    keys: Keys = None,
    templates: Annotated[str | None, typer.Option(help="JSON file of prompt templates, or a known set.")] = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    shift: Shifts = None,
    before_head: BeforeHead = False,
    precision: Precision = None,
    json_file: JsonFile = None,
    trust: TrustModel = False,
    patience: Patience = 60.0,
) -> None:
    """Zero-shot classification of labelled shards: top-1, top-5, mean per-class recall."""
    from launch.evaluate import evaluate_model, evaluator_config

    shared = _shared_options(data, batch_size, limit, precision, before_head=before_head)
    config = evaluator_config("zeroshot", keys, classes=classes, templates=templates, shifts=shift, **shared)
    evaluate_model(model, config, json_file, trust=trust, patience=patience)


@eval_app.command()
def retrieval(  # noqa: PLR0913 - the options of the command line
    model: ModelName,
    data: DataPattern,
    keys: Keys = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    txt: TxtMembers = None,
    before_head: BeforeHead = False,
    precision: Precision = None,
    json_file: JsonFile = None,
    trust: TrustModel = False,
    patience: Patience = 60.0,
) -> None:
    """Image-text retrieval both ways, with all captions of each image: R@1/5/10 and median rank."""
    from launch.evaluate import evaluate_model, evaluator_config

    shared = _shared_options(data, batch_size, limit, precision, before_head=before_head)
    config = evaluator_config("retrieval", keys, txt=txt, **shared)
    evaluate_model(model, config, json_file, trust=trust, patience=patience)


@eval_app.command()
def geometry(  # noqa: PLR0913 - the options of the command line
    model: ModelName,
    data: DataPattern,
    keys: Keys = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    txt: TxtMembers = None,
    shift: Shifts = None,
    before_head: BeforeHead = False,
    precision: Precision = None,
    json_file: JsonFile = None,
    trust: TrustModel = False,
    patience: Patience = 60.0,
    plots: Plots = None,
) -> None:
    """The two clouds of embeddings and the gap between them; retrieval while the gap is moved."""
    from launch.evaluate import evaluate_model, evaluator_config

    shared = _shared_options(data, batch_size, limit, precision, before_head=before_head)
    config = evaluator_config("geometry", keys, shifts=shift, txt=txt, **shared)
    evaluate_model(model, config, json_file, plots, trust=trust, patience=patience)


@eval_app.command(name=_OWN)
def own(  # noqa: PLR0913 - the options of the command line
    kind: Annotated[str, typer.Argument(help="The class of its configuration.", metavar=_OWN)],
    model: ModelName,
    keys: Keys = None,
    data: OwnData = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    before_head: BeforeHead = False,
    precision: Precision = None,
    json_file: JsonFile = None,
    trust: TrustModel = False,
    patience: Patience = 60.0,
    plots: Plots = None,
) -> None:
    """An evaluator of your own, a subclass of eval.evaluator.EvaluatorConfig; its keys follow the model."""
    from launch.evaluate import evaluate_model, evaluator_config

    shared = _shared_options(data, batch_size, limit, precision, before_head=before_head)
    config = evaluator_config(kind, keys, **shared)
    evaluate_model(model, config, json_file, plots, trust=trust, patience=patience)


def _shared_options(
    data: list[str] | None, batch_size: int | None, limit: int | None, precision: str | None, *, before_head: bool
) -> dict[str, Any]:
    """The keys of `ShardEvaluationConfig` for which there are options; None where one was not given."""
    return {
        "shards": data,
        "batch_size": batch_size,
        "limit": limit,
        "precision": precision,
        "embedding": "before_head" if before_head else None,
    }
