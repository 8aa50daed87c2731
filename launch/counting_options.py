"""The options of `vlm data counting`, read before torch is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from vlm.errors import EveryRankError

IN_JSON: Final = "json:"
_TRANSFORMERS: Final = "transformers:"
_DEFAULT_SCORE: Final = 0.5
_DEFAULT_BATCH: Final = 8


@dataclass(frozen=True)
class DetectionOptions:
    """What counts the objects in the pictures; None where nothing is said."""

    detections: Annotated[
        str | None,
        typer.Option(
            help="A file of counts or detections (.jsonl), of COCO's instances (.json), or json:FIELD of each sample.",
            metavar="FILE|json:FIELD",
        ),
    ] = None
    detector: Annotated[
        str | None,
        typer.Option(help="An object detector in a local folder, which looks itself.", metavar="transformers:PATH"),
    ] = None
    captions_only: Annotated[
        bool, typer.Option("--captions-only", help="Believe every caption's number, as the paper's naive filtering.")
    ] = False
    join: Annotated[
        str | None,
        typer.Option(
            help="With a file: the json field by which it names samples; by default their key.", metavar="FIELD"
        ),
    ] = None
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least score of a detection that counts; 0.5 by default.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="With --detector: pictures a forward; 8 by default.")
    ] = None

    @property
    def score(self) -> float:
        """The least score."""
        return _DEFAULT_SCORE if self.min_score is None else self.min_score

    @property
    def batch(self) -> int:
        """Pictures a forward."""
        return _DEFAULT_BATCH if self.batch_size is None else self.batch_size

    @property
    def in_json(self) -> str | None:
        """The field of each sample's json that holds its counts; None where they are elsewhere."""
        given = self.detections or ""
        return given.removeprefix(IN_JSON) if given.startswith(IN_JSON) else None

    @property
    def detector_folder(self) -> str:
        """The folder of the detector."""
        return (self.detector or "").removeprefix(_TRANSFORMERS)

    def require_possible(self) -> None:
        """Refuse no source of counts, several, and what means nothing with the one that there is."""
        sources = {
            "--detections": self.detections is not None,
            "--detector": self.detector is not None,
            "--captions-only": self.captions_only,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) != 1:
            found = "none of them is given" if not given else f"found {' and '.join(given)}"
            raise EveryRankError(f"one of {', '.join(sources)} is needed: {found}")
        if self.in_json == "":
            raise EveryRankError("--detections json: names no field; write json:counts")
        if self.detector is not None and not self.detector.startswith(_TRANSFORMERS):
            raise EveryRankError(f"--detector {self.detector}: a detector is named as {_TRANSFORMERS}PATH")
        file_is_given = given == ["--detections"] and self.in_json is None
        meaningless = {
            "--join": self.join is not None and not file_is_given,
            "--min-score": self.min_score is not None and not (file_is_given or given == ["--detector"]),
            "--batch-size": self.batch_size is not None and given != ["--detector"],
        }
        for name in (name for name, is_meaningless in meaningless.items() if is_meaningless):
            source = self.detections if self.in_json is not None else None
            raise EveryRankError(f"{name}: means nothing with {given[0]}{f' {source}' if source else ''}")


@dataclass(frozen=True)
class BalanceOptions:
    """The set that is written, and how small numbers are made rarer."""

    out: Annotated[Path, typer.Option(help="The folder for the counting set.")]
    most_per_number: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**9, help="Most samples of each of 2 to 6; by default those of the most frequent of 7 to 10."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=-(2**62), max=2**62, help="Of the draw among these.")] = 0
