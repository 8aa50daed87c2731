"""The recipe: one YAML file that says everything about a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from data.config import DataConfig
from data.order.order import default_lanes
from eval.evaluator import EvaluatorConfig
from vlm.config import first_problem
from vlm.errors import UserError, nearest
from vlm.model.config import ModelConfig
from vlm.training.trainer import TrainingConfig

RECIPES = Path(__file__).parent / "recipes"

# What may differ between a run and its resumption: none of it changes what is learned.
FREE_ON_RESUME = (
    "engine",
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
    "checkpoint_every",
    "keep_checkpoints",
    "record_samples",
    "trackers",
    "evaluate",
)


class Recipe(TrainingConfig):
    """A run: the model, the data, how it trains, and what is measured on the way."""

    run: str = Field(description="the run directory: metrics, checkpoints, report")
    model: ModelConfig
    data: DataConfig
    evaluate: dict[str, EvaluatorConfig] = Field(default={}, description="evaluations by name")


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in file `name`, or the one that ships under this name, with `key.path=value` overrides applied.

    Raises:
        UserError: no such recipe, no valid YAML, an unknown key, a wrong type or an impossible value.
    """
    path = find_recipe(name)
    values = _read(path, ())
    for override in overrides:
        _override(values, override)
    values.setdefault("run", f"runs/{path.stem}")
    return check_recipe(values, str(path))


def check_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that `values` describe. Raises UserError, in one line that begins with `where`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, Recipe)}") from None


def resolve_order(recipe: Recipe) -> Recipe:
    """The recipe with the number of lanes written out: it is fixed for the run, whatever a later default would be."""
    lanes = default_lanes(recipe.global_batch) if recipe.data.lanes is None else recipe.data.lanes
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"lanes": lanes})})


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of one that ships. Raises UserError when there is none."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and shipped.is_file():
        return shipped
    known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {name}: no such file, and no recipe ships under this name; {nearest(path.stem, known)}")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two resolved recipes differ, those aside that may differ on resumption."""
    before, after = _flatten(old), _flatten(new)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)]


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` leads back to itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    inherited = _read(beside if beside.is_file() else find_recipe(str(base)), (*seen, path.resolve()))
    return _merge(inherited, values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inherited = merged.get(key)
        both = isinstance(inherited, dict) and isinstance(value, dict)
        merged[key] = _merge(inherited, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is no YAML value") from None
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        place = _step_into(place, part, key)
    if isinstance(place, list):
        place[_position(place, last, key)] = value
    else:
        place[last] = value


def _step_into(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    inner = place.get(part)
    if not isinstance(inner, dict | list):
        inner = place[part] = {}
    return inner


def _position(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"override {key}: {part!r} is no position in a list of {len(place)}")
    return int(part)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
