"""The files of a run as a report reads them: what is in them has the form that the run gave it, or one line says so."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from vlm.config import first_problem
from vlm.errors import UserError
from vlm.json_lines import read_lines
from vlm.metric import Better, FigureTable, Metric, Prominence, Unit
from vlm.sealed import read_json_object, read_yaml_mapping

_LARGEST = 1e300
_EVALUATION, _GEOMETRY, _PROFILE = "eval/", "geometry/", "profile/"
Count = Annotated[int, Field(ge=0, le=2**62)]
Checked = TypeVar("Checked", bound=BaseModel)


class _StoredPart(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Source(_StoredPart):
    name: str
    shards: Count
    samples: Count


class _Machine(_StoredPart):
    gpu: str | None = None
    processor: str | None = None
    cores: Count | None = None
    memory_gib: FiniteFloat | None = None
    system: str | None = None


class _Metric(_StoredPart):
    name: Annotated[str, Field(pattern="^[^/]+$", max_length=1000)]
    better: Better | None = None
    description: str = ""
    unit: Unit = "number"
    label: str = ""
    group: str = ""
    prominence: Prominence = "usual"


class _Facts(_StoredPart):
    started: str = ""
    machine: _Machine = _Machine()
    versions: dict[str, str | None] = {}
    world_size: Count | None = None
    engine: str | None = None
    precision: str | None = None
    threads: Count | None = None
    num_parameters: Count | None = None
    data: list[_Source] = []
    metrics: dict[str, list[_Metric]] = {}


class _Retrieved(_StoredPart):
    text: str
    correct: bool
    score: float


class _Generated(_StoredPart):
    method: str
    text: str
    log_likelihood: float


class _RetrievalExample(_StoredPart):
    image: str
    captions: list[str]
    rank: Count
    retrieved: list[_Retrieved]


class _CaptionExample(_StoredPart):
    image: str
    captions: list[str]
    cider_d: float
    generated: list[_Generated]


def _kind_of_example(value: Any) -> str:
    return "caption" if isinstance(value, Mapping) and "generated" in value else "retrieval"


_Example = Annotated[
    Annotated[_RetrievalExample, Tag("retrieval")] | Annotated[_CaptionExample, Tag("caption")],
    Discriminator(_kind_of_example),
]


class _Examples(_StoredPart):
    best: list[_Example] = []
    worst: list[_Example] = []
    model_config = ConfigDict(extra="forbid", strict=True)


class _FigureTable(_StoredPart):
    title: str
    columns: list[str]
    rows: dict[str, list[FiniteFloat]]
    unit: Unit | list[Unit] = "number"
    note: str = ""

    @model_validator(mode="after")
    def _of_one_width(self) -> "_FigureTable":
        widths = {len(self.columns), *map(len, self.rows.values())}
        if len(widths) > 1 or (isinstance(self.unit, list) and len(self.unit) not in widths):
            raise ValueError("its rows are not as long as its columns")
        return self


class _Skip(_StoredPart):
    source: str
    reason: str


class _Recipe(_StoredPart):
    model: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics; what is being written at the end is left out.

    Raises:
        UserError: a line is not as a run writes it.
    """
    lines, num_bins = read_lines(path).records, 0
    for number, line in enumerate(lines, start=1):
        for key, value in line.items():
            if isinstance(value, int | float):
                if isinstance(value, int) and abs(value) > _LARGEST:
                    _refuse(path, number, f"{key} is out of all bounds")
            elif isinstance(value, list) and key.startswith(_GEOMETRY):
                num_bins = num_bins or len(value)
                if not _is_histogram(value, num_bins):
                    _refuse(path, number, f"{key} is no histogram in {num_bins} bins")
            elif isinstance(value, dict) and key.startswith((_EVALUATION, _PROFILE)):
                _check_table(path, number, key, value)
        if "loss" in line and not (_is_count(line.get("samples"), 1) and _is_count(line["step"], 1)):
            _refuse(path, number, "it does not say after how many steps and samples")
        if not _is_count(line.get("steps_left_out", 0), 0):
            _refuse(path, number, "steps_left_out is no number of steps")
    return lines


def _check_table(path: Path, number: int, key: str, value: dict[str, Any]) -> None:
    try:
        _FigureTable.model_validate(value)
    except ValidationError as error:
        _refuse(path, number, f"{key}: {first_problem(error, _FigureTable)}")


def figure_table(value: Mapping[str, Any]) -> FigureTable:
    """A table as a run wrote it, which `read_figures` has looked through; keys of a newer version are left out."""
    known = {field.name for field in fields(FigureTable)}
    return FigureTable(**{key: value[key] for key in known & value.keys()})


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= 2**62


def _is_histogram(values: list[Any], num_bins: int) -> bool:
    numbers = all(isinstance(value, int | float) and 0 <= value <= _LARGEST for value in values)
    return bool(values) and len(values) == num_bins and numbers


def _refuse(path: Path, number: int, why: str) -> NoReturn:
    raise UserError(f"{path}: line {number} is damaged: {why} (take the line out, or put a copy back)")


def read_skips(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, each with a source and a reason. Raises UserError for any other line."""
    lines = read_lines(path).records
    for number, line in enumerate(lines, start=1):
        try:
            _Skip.model_validate(line)
        except ValidationError as error:
            _refuse(path, number, first_problem(error, _Skip))
    return lines


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of where and with what a run ran; empty where there are none. Raises UserError for damage."""
    return _checked(path, read_json_object(path), _Facts) if path.is_file() else {}


def declared_metrics(facts: Mapping[str, Any]) -> dict[str, dict[str, Metric]]:
    """The metrics that a run's facts declare, by evaluation and name; keys that a newer version added are left out."""
    known = {field.name for field in fields(Metric)}
    return {
        evaluation: {one["name"]: Metric(**{key: one[key] for key in known & one.keys()}) for one in metrics}
        for evaluation, metrics in facts.get("metrics", {}).items()
    }


def read_examples(path: Path) -> dict[str, Any]:
    """The listed examples by kind. Raises UserError for damage."""
    return _checked(path, read_json_object(path), _Examples)


def read_recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe; empty when there is none. Raises UserError for damage."""
    return _checked(path, read_yaml_mapping(path), _Recipe) if path.is_file() else {}


def _checked(path: Path, values: dict[str, Any], form: type[BaseModel]) -> dict[str, Any]:
    try:
        TypeAdapter(form).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {first_problem(error, form)} (put a copy back)") from None
    return values
