"""The recipe: one YAML file that says everything about a run."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from data.config import DataConfig
from data.order.order import default_lanes
from eval.recipe import Evaluations
from launch.recipe_file import read_recipe
from vlm.config import first_problem
from vlm.errors import UserError
from vlm.model.config import ModelConfig
from vlm.paths import LocalPath, address_kind, shown
from vlm.training.config import TrainingConfig

# Where the data lies: a resumed run compares what it holds instead.
_PLACES = re.compile(r"data\.root|data\.(documents\.)?sources\.[^.]+\.(shards|neighbours\.labels)")

# What may differ between the ranks of a run: where each of them reads, and how.
_OF_A_RANK = re.compile(
    r"data\.(root|workers|prefetch|(cache|retry)\..*|(documents\.)?sources\.[^.]+\.(shards|neighbours\.labels))|evaluate\.[^.]+\.shards"
)

# What may differ between a run and its resumption: none of it changes what is learned.
_FOLLOW_THE_MODEL = ("model.towers.image.pool", "model.towers.text.pool", "model.towers.text.context_length")
FREE_ON_RESUME = (
    "activation_checkpointing",
    "engine",
    "engine_options.bucket_mib",
    "engine_options.offload",
    "engine_options.overlap",
    "engine_options.prefetch",
    "engine_options.shard_group",
    "run",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.retry",
    "data.patience",
    "data.max_bad_share",
    "log_every",
    "geometry",
    "alarm",
    "max_bad_steps",
    "hang_after",
    "profile",
    "guard.most",
    "guard.within",
    "checkpoint_every",
    "checkpoint_in_background",
    "keep_checkpoints",
    "record_samples",
    "sync",
    "trackers",
    "evaluate",
)


def _store(url: str) -> str:
    """The URL of a store that can be written to: no web page, no command, no folder."""
    kind = address_kind(url)
    if kind in (None, "http", "https", "file", "pipe") or "://" not in url or re.search(r"[\s?*\[\]]", url):
        raise ValueError(f"{shown(url)} is no store that can be written to; write one as in s3://bucket/run")
    return url


def _no_store(given: Any) -> Any:
    """A run writes lines to files and makes links, which no store can: it has a folder, and a copy in the store."""
    kind = address_kind(given) if isinstance(given, str) else None
    if kind not in (None, "file", "pipe"):
        raise ValueError(
            f"{shown(given)} is no local path but an address ({kind}); write a folder of this machine, and sync: "
            f"{shown(given)} beside it, where each checkpoint is copied to"
        )
    return given


class Recipe(TrainingConfig):
    """A run: the model, the data, how it trains, and what is measured on the way."""

    run: Annotated[LocalPath, BeforeValidator(_no_store)] = Field(
        description="the run directory: metrics, checkpoints, report"
    )
    sync: Annotated[str, AfterValidator(_store)] | None = Field(
        default=None, description="a store (s3://bucket/run, gs://, ...) that each checkpoint is copied to; null: none"
    )
    model: ModelConfig = Field(description="what is trained: two towers and their heads")
    data: DataConfig = Field(description="what it is trained on")
    evaluate: Evaluations = Field(default={}, description="evaluations by name")


def load_recipe(name: str, overrides: Iterable[str] = (), *, trust: bool = False) -> Recipe:
    """The recipe in file `name`, or the one that ships under this name, with `key.path=value` overrides applied.

    Raises:
        UserError: no such recipe, no valid YAML, an unknown key, a wrong type or an impossible value; without `trust`,
            a program in the file.
    """
    path, values = read_recipe(name, overrides, trust=trust)
    return check_recipe(values, str(path))


def check_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that `values` describe. Raises UserError, in one line that begins with `where`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, Recipe)}") from None


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what is left open written out, which is fixed for the run: the number of lanes, and precision."""
    data, documents = recipe.data, recipe.data.documents
    changes: dict[str, Any] = {"lanes": data.lanes or default_lanes(recipe.global_batch)}
    if documents is not None:
        lanes = documents.lanes or default_lanes(documents.per_step)
        changes["documents"] = documents.model_copy(update={"lanes": lanes})
    decided = {"precision": recipe.decided_precision, "data": data.model_copy(update=changes)}
    return recipe.model_copy(update=decided)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two resolved recipes differ, those aside that may differ on resumption."""
    before, after = _flatten(old), _flatten(new)
    keys = [key for key in _different(before, after) if not _PLACES.fullmatch(key)]
    # Runs of version 0.1.0 wrote the defaults out that now follow the model; the checkpoint says what they were.
    keys = [key for key in keys if not (key in _FOLLOW_THE_MODEL and after.get(key) is None)]
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)]


def moved_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys by which two resolved recipes find their data in different places."""
    return [key for key in _different(_flatten(old), _flatten(new)) if _PLACES.fullmatch(key)]


def keys_that_differ(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two ranks of one run differ, though all of them need them alike."""
    return [key for key in _different(_flatten(first), _flatten(other)) if not _OF_A_RANK.fullmatch(key)]


def _different(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
