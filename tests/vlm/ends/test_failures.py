import json
from pathlib import Path

from vlm.ends.failures import FAILURES, Failures


def test_each_failure_is_one_line_of_its_rank(tmp_path: Path) -> None:
    Failures(tmp_path, rank=0).add("step", "step 12 left out: the loss is nan", step=12, keys=["a", "b"])
    Failures(tmp_path, rank=3).add("end", "rank 3: \nsecond line")
    first, second = (json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines())
    assert (first["rank"], first["kind"], first["step"], first["keys"]) == (0, "step", 12, ["a", "b"])
    assert (second["rank"], second["message"]) == (3, "rank 3: \nsecond line")
    assert first["time"] <= second["time"]


def test_a_run_directory_that_was_never_made_is_not_made_now(tmp_path: Path) -> None:
    Failures(tmp_path / "run", rank=0).add("end", "refused")
    assert not (tmp_path / "run").exists()
