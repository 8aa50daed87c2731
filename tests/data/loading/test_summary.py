"""A batch larger than its data, or of one pair, is told at the start in both modes of reading."""

from pathlib import Path

import pytest

from data.config import DataConfig
from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.loading.summary import SourceSummary, batch_notices
from tests.data.small_shards import write_source
from vlm.distributed.world import World
from vlm.model.image_spec import ImageSpec

SOURCES = [SourceSummary("small", ("a.tar",), 3, 0.25), SourceSummary("large", ("b.tar", "c.tar"), 100, 0.75)]


def test_more_pairs_than_samples_are_negatives_of_themselves() -> None:
    assert batch_notices(SOURCES, 12) == ()
    (notice,) = batch_notices(SOURCES, 16)
    assert notice == (
        "global_batch: 4 of its 16 pairs come from small, which has 3: "
        "samples come twice in a batch, and are negatives of themselves"
    )


def test_one_pair_has_no_negatives() -> None:
    (notice,) = batch_notices(SOURCES, 1)
    assert notice.startswith("global_batch: a batch of 1 pair has no negatives")


@pytest.mark.parametrize("stream", [TrainStream, SequentialStream])
def test_a_stream_says_so(stream: type, tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [3])
    config = DataConfig(sources={"few": {"shards": pattern, "num_samples": 3}}, workers=0)
    found = stream(config, ImageSpec(size=16), lambda texts: texts, global_batch=8, seed=0, world=World())
    assert "8 of its 8 pairs come from few, which has 3" in found.notices[-1]
