"""The `vlm eval` commands: thin, one a kind of evaluator, and one for a class of the user's own."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.caption_options import GenerationOptions
from launch.options import grouped
from vlm.imports import fast_imports

_OWN_CLASS = "package.module:Class"

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
QuestionShards = Annotated[
    list[str] | None,
    typer.Option("--data", help="Shards that ask, or with a file's images; patterns as elsewhere; repeatable."),
]
QuestionFiles = Annotated[
    list[str] | None, typer.Option("--file", help="The benchmark's file, as published; repeatable.")
]
ImageFolder = Annotated[str | None, typer.Option("--images", help="The folder of the file's images.")]
ClassNames = Annotated[str, typer.Option(help="JSON file of class names, or the name of a known list.")]
Templates = Annotated[str | None, typer.Option(help="JSON file of prompt templates, or a known set.")]
TxtMembers = Annotated[
    str | None, typer.Option(help='Of a txt member: "whole", "lines" (a caption each), or by the set\'s layout.')
]
Shifts = Annotated[
    list[float] | None,
    typer.Option(
        "--shift", min=-100, max=100, help="Move images and texts together by this share of their gap; repeatable."
    ),
]
Plots = Annotated[Path | None, typer.Option(help="Draw what the evaluator has to show into this folder.")]


@dataclass(frozen=True)
class SharedOptions:
    """The options of every evaluator."""

    batch_size: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Rows a forward, 256 by default; no figure depends on it.")
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, max=10**12, help="Only the first so many samples.")] = None
    before_head: Annotated[bool, typer.Option("--before-head", help="Read embeddings before the projection heads.")] = (
        False
    )
    precision: Annotated[
        str | None, typer.Option(help="Of the towers' products: fp32 (the default) or bf16, as in recipes.")
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=512, help="Loading processes a rank; 2 by default, and none for a few batches."),
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None
    trust: TrustModel = False
    patience: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds of silence after which a rank is given up.")
    ] = 60.0


class _Kinds(TyperGroup):
    """Commands by the kind of evaluator; a word with a colon is the class of one's own."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_class = bool(args) and ":" in args[0] and not args[0].startswith("-")
        return super().resolve_command(ctx, [_OWN_CLASS, *args] if is_class else args)


eval_app = typer.Typer(cls=_Kinds, help="Measure a checkpoint, a run, or an open_clip model.", no_args_is_help=True)


@eval_app.command()
@grouped
def zeroshot(
    model: ModelName,
    data: DataPattern,
    classes: ClassNames,
    shared: SharedOptions,
    keys: Keys = None,
    templates: Templates = None,
    shift: Shifts = None,
) -> None:
    """Zero-shot classification of labelled shards: top-1, top-5, mean per-class recall."""
    options = {"classes": classes, "templates": templates, "shifts": shift}
    _evaluate("zeroshot", model, data, keys, shared, options)


@eval_app.command()
@grouped
def generative_zeroshot(
    model: ModelName,
    data: DataPattern,
    classes: ClassNames,
    shared: SharedOptions,
    keys: Keys = None,
    templates: Templates = None,
    normalise: Annotated[
        str | None, typer.Option(help="Of a prompt's likelihood: total, token (a mean) or prior (over the text's own).")
    ] = None,
) -> None:
    """Zero-shot classification by the captioning decoder: the class whose prompt is the likeliest caption."""
    options = {"classes": classes, "templates": templates, "normalise": normalise}
    _evaluate("generative_zeroshot", model, data, keys, shared, options)


@eval_app.command()
@grouped
def retrieval(
    model: ModelName, data: DataPattern, shared: SharedOptions, keys: Keys = None, txt: TxtMembers = None
) -> None:
    """Image-text retrieval both ways, with all captions of each image: R@1/5/10 and median rank."""
    _evaluate("retrieval", model, data, keys, shared, {"txt": txt})


@eval_app.command()
@grouped
def geometry(
    model: ModelName,
    data: DataPattern,
    shared: SharedOptions,
    keys: Keys = None,
    txt: TxtMembers = None,
    shift: Shifts = None,
    plots: Plots = None,
) -> None:
    """The two clouds of embeddings and the gap between them; retrieval while the gap is moved."""
    _evaluate("geometry", model, data, keys, shared, {"shifts": shift, "txt": txt}, plots)


@eval_app.command()
@grouped
def caption(
    model: ModelName,
    data: DataPattern,
    generation: GenerationOptions,
    shared: SharedOptions,
    keys: Keys = None,
    txt: TxtMembers = None,
) -> None:
    """Generated captions beside the references: CIDEr-D, BLEU-4, ROUGE-L, and whether the decoder sees the image."""
    given = {name: value for name, value in asdict(generation).items() if value is not None}
    _evaluate("caption", model, data, keys, shared, {"txt": txt, "generation": given or None})


@eval_app.command()
@grouped
def counting(
    model: ModelName,
    shared: SharedOptions,
    keys: Keys = None,
    data: QuestionShards = None,
    file: QuestionFiles = None,
    images: ImageFolder = None,
    plots: Plots = None,
) -> None:
    """The caption with the right number among those with another: CountBench's file, or counted shards."""
    _evaluate("counting", model, data, keys, shared, {"file": file, "images": images}, plots)


@eval_app.command()
@grouped
def compositional(
    model: ModelName,
    shared: SharedOptions,
    keys: Keys = None,
    data: QuestionShards = None,
    file: QuestionFiles = None,
    images: ImageFolder = None,
    txt: TxtMembers = None,
) -> None:
    """The true caption among almost right ones: SugarCrepe, ARO, Winoground, or shards that name wrong captions."""
    _evaluate("compositional", model, data, keys, shared, {"file": file, "images": images, "txt": txt})


@eval_app.command(name=_OWN_CLASS)
@grouped
def own_class(
    kind: Annotated[str, typer.Argument(help="The class of its configuration.", metavar=_OWN_CLASS)],
    model: ModelName,
    shared: SharedOptions,
    keys: Keys = None,
    data: OwnData = None,
    plots: Plots = None,
) -> None:
    """An evaluator of your own, a subclass of eval.evaluator.EvaluatorConfig; its keys follow the model."""
    _evaluate(kind, model, data, keys, shared, {}, plots)


def _evaluate(
    kind: str,
    model: str,
    data: list[str] | None,
    keys: list[str] | None,
    shared: SharedOptions,
    options: dict[str, Any],
    plots: Path | None = None,
) -> None:
    """Evaluate by the options of a command: its own, and those of `ShardEvaluationConfig`; None where not given."""
    with fast_imports():
        from launch.evaluate import evaluate_model, evaluator_config

    config = evaluator_config(
        kind,
        keys,
        shards=data,
        batch_size=shared.batch_size,
        limit=shared.limit,
        precision=shared.precision,
        workers=shared.workers,
        embedding="before_head" if shared.before_head else None,
        **options,
    )
    evaluate_model(model, config, shared.json_file, plots, trust=shared.trust, patience=shared.patience)
