"""Counts by an object detector that looks at the candidates' pictures itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from data.check.samples import FindingError, StoredSample
from data.counting.source import Candidate, CountSource, Seen
from data.images.picture import Picture
from data.images.pillow import turned_upright
from data.samples.bad_sample import BadSampleError
from vlm.errors import reason
from vlm.model.detector import Detector, Prepared, UndetectableError

_TOGETHER: Final = 64


class DetectorCounts(CountSource):
    """The counts that a detector finds, of `batch_size` pictures at most in a forward.

    Pictures of one prepared size share a forward, so that none is padded, and those of one part of a shard alone: what
    is detected depends on the shard and the options, not on ranks.
    """

    together = _TOGETHER
    looks = True

    def __init__(self, detector: Detector, min_score: float, batch_size: int) -> None:
        self._detector = detector
        self._min_score = min_score
        self._batch_size = batch_size

    def plan(self) -> dict[str, Any]:
        """Kernels choose their order of summation by shape, so the batch is part of it."""
        return {
            "detections": f"detector {self._detector.identity}",
            "min_score": self._min_score,
            "batch_size": self._batch_size,
            "together": self.together,
        }

    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        """What is found in each picture, or why that cannot be read."""
        results: list[Seen] = [None] * len(candidates)
        waiting: dict[tuple[int, ...], list[tuple[int, Prepared]]] = {}
        for place, candidate in enumerate(candidates):
            try:
                prepared = self._detector.prepared(upright_pixels(candidate.sample))
            except (FindingError, BadSampleError, UndetectableError) as error:
                results[place] = reason(error)
                continue
            batch = waiting.setdefault(tuple(prepared["pixel_values"].shape), [])
            batch.append((place, prepared))
            if len(batch) == self._batch_size:
                self._detect(batch, results)
                batch.clear()
        for batch in waiting.values():
            self._detect(batch, results)
        return results

    def nothing_known(self, key: str, fields: Mapping[str, Any]) -> str:
        """Never asked for: a detector that sees nothing has looked."""
        raise NotImplementedError

    def _detect(self, batch: Sequence[tuple[int, Prepared]], results: list[Seen]) -> None:
        if not batch:
            return
        found: Sequence[Seen]
        try:
            found = self._detector.counts([prepared for _, prepared in batch], self._min_score)
        except UndetectableError as error:
            found = [str(error)] * len(batch)
        for (place, _), counts in zip(batch, found, strict=True):
            results[place] = counts


def upright_pixels(sample: StoredSample) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels of a sample's picture as it is to be seen, [height, width, 3]. Raises FindingError, BadSampleError."""
    picture = Picture(sample.image())
    return np.array(turned_upright(Image.fromarray(picture.rgb()), picture.orientation))
