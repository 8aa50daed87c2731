"""Lengths of training with their unit: "40 epochs", "2000 steps", "1.2M samples"; of a stretch of a run, "20%" too."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

Unit = Literal["steps", "samples", "epochs"]

_PATTERN = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kMG]?)\s*(step|sample|epoch)s?", re.IGNORECASE)
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_UNITS: dict[str, Unit] = {"step": "steps", "sample": "samples", "epoch": "epochs"}
_PERCENT = re.compile(r"([0-9]*\.?[0-9]+)\s*%")
_SCHEMA_PATTERN = r"\s*[0-9_,]*\.?[0-9_,]+(e[+-]?[0-9]+)?\s*[kKmMgG]?\s*(steps?|samples?|epochs?)\s*"
_LONGEST: dict[Unit, int] = {"steps": 10**12, "samples": 10**15, "epochs": 10**9}


@dataclass(frozen=True)
class Duration:
    """An amount of training in optimizer steps, samples seen, or epochs."""

    amount: float
    unit: Unit

    @staticmethod
    def parse(text: str) -> "Duration":
        """The duration that `text` names. Raises ValueError when the number or the unit is missing."""
        match = _PATTERN.fullmatch(text.strip().replace("_", "").replace(",", ""))
        if match is None:
            raise ValueError('a duration is a number and a unit: "40 epochs", "2000 steps" or "1.2M samples"')
        number, multiple, unit = match.groups()
        amount = float(number) * _MULTIPLES[multiple.lower()]
        canonical = _UNITS[unit.lower()]
        if amount > _LONGEST[canonical]:
            raise ValueError(
                f"{text.strip():.60} is longer than any run; at most {_LONGEST[canonical]:.0e} {canonical}"
            )
        return Duration(amount, canonical)

    def steps(self, global_batch: int, samples_per_epoch: int) -> int:
        """The same length in optimizer steps, rounded up; zero stays zero."""
        samples = {
            "steps": self.amount * global_batch,
            "samples": self.amount,
            "epochs": self.amount * samples_per_epoch,
        }[self.unit]
        return math.ceil(round(samples / global_batch, 6))

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> "Duration":
            if isinstance(value, Duration):
                return value
            if not isinstance(value, str):
                raise ValueError('a duration names its unit: "40 epochs", "2000 steps" or "1.2M samples"')  # noqa: TRY004
            return Duration.parse(value)

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": rf"^{_SCHEMA_PATTERN}$"}


@dataclass(frozen=True)
class Stretch:
    """A stretch of a run: a length of training, or a percentage of the run's steps, which then follows its duration."""

    length: Duration | None
    percent: float = 0.0

    @staticmethod
    def parse(text: str) -> "Stretch":
        """The stretch that `text` names. Raises ValueError for one that is no length of training, nor 0 to 100%."""
        match = _PERCENT.fullmatch(text.strip())
        if match is None:
            try:
                return Stretch(_positive(Duration.parse(text)))
            except ValueError as error:
                raise ValueError(f'{error}, or percent of the run: "20%"') from None
        percent = float(match.group(1))
        if not 0 < percent <= 100:
            raise ValueError(f"must be more than 0% and at most 100%, found {text.strip()}")
        return Stretch(None, percent)

    def steps(self, global_batch: int, samples_per_epoch: int, num_steps: int) -> int:
        """The same stretch of a run of `num_steps` in optimizer steps, rounded up."""
        if self.length is not None:
            return self.length.steps(global_batch, samples_per_epoch)
        return math.ceil(round(self.percent * num_steps / 100, 6))

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.length is None else str(self.length)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> "Stretch":
            if isinstance(value, Stretch):
                return value
            if not isinstance(value, str):
                raise ValueError('a stretch of a run names its unit: "2000 steps", "1.2M samples" or "20%"')  # noqa: TRY004
            return Stretch.parse(value)

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": rf"^({_SCHEMA_PATTERN}|\s*[0-9]*\.?[0-9]+\s*%\s*)$"}


def _positive(duration: Duration) -> Duration:
    if duration.amount <= 0:
        raise ValueError(f"must be longer than zero, found {duration}")
    return duration


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
