"""The doctor on two real ranks with real data, what each check says of a fault, and its exit codes."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from launch.doctor.check import CHECKS, Check, Place
from launch.doctor.clocks import skew_of
from launch.doctor.command import examine
from launch.doctor.limits import open_files, shared_memory
from launch.doctor.order import SampleOrder
from launch.doctor.sources import Index, Sources
from launch.doctor.tokenizer import TokenizerAndModel
from launch.doctor.versions import unfit
from launch.findings import Finding, worst
from launch.main import run
from launch.recipe import Recipe, load_recipe
from tests.launch.tiny import write_tiny, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.distributed.world import World


def recipe_in(folder: Path, **changes: object) -> Recipe:
    return load_recipe(write_tiny_recipe(folder, folder / "run", **changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


def states(findings: list[Finding]) -> dict[str, str]:
    return {check: worst([one for one in findings if one.check == check]) for check in {one.check for one in findings}}


def on_a_rank(folder: Path) -> bool:
    return examine(recipe_in(folder, data={"shuffle_shards": 2}), json_file=folder / "found.json")


def test_two_ranks_send_read_and_step(data: Path) -> None:
    """Every check, under the engine of the recipe, a real all-gather, reduce-scatter and step among them."""
    assert run_ranks(on_a_rank, 2, data, group=False) == [True, True]
    found = json.loads((data / "found.json").read_text())
    assert found["ranks"] == 2
    assert {one["check"] for one in found["findings"]} == set(CHECKS.names())
    said = [one["found"] for one in found["findings"]]
    assert any(words.startswith("all-gather of 2 ranks: each sends") for words in said)
    assert any(words.startswith("reduce-scatter of 2 ranks") for words in said)
    assert any("GB predicted" in words and "GB measured" in words for words in said)
    assert any("2 of 2 shards have no index" in words or "have no index" in words for words in said)
    assert not (data / "run").exists()


def alone(check: type[Check], recipe: Recipe, world: World | None = None) -> list[Finding]:
    return list(check().findings(Place(world or World(), recipe)))


def test_shards_that_are_gone_or_changed_are_told(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.idx", "*.gz"))
    recipe = recipe_in(folder)
    assert states(alone(Index, recipe)) == {"index": "warn"}
    assert states(alone(Sources, recipe)) == {"sources": "ok"}
    gone = recipe_in(folder, data={"sources": {"pairs": {"shards": "nowhere-*.tar"}}})
    (finding,) = alone(Sources, gone)
    assert finding.state == "fail"
    assert "nowhere-*.tar" in finding.line
    assert alone(Index, gone)[0].state == "fail"


def test_the_tokenizer_is_compared_with_the_model(data: Path) -> None:
    assert states(alone(TokenizerAndModel, recipe_in(data))) == {"tokenizer": "ok"}


def test_numbers_that_do_not_go_together_fail_the_order(data: Path) -> None:
    from data.shards.cache import ShardCache
    from data.shards.folder_index import FolderIndex

    recipe = recipe_in(data)
    FolderIndex(ShardCache(recipe.data.cache, recipe.data.retry), "").load_or_build(
        sorted(map(str, data.glob("*.tar")))
    )
    (finding,) = alone(SampleOrder, recipe)
    assert finding == Finding("order", "ok", "12 pairs of the first batch on rank 0")
    lanes = recipe_in(data, data={"lanes": 5})
    (finding,) = alone(SampleOrder, lanes)
    assert finding.state == "fail"
    assert "5 lanes do not divide" in finding.words


def test_limits_clocks_and_versions_have_bounds() -> None:
    assert open_files(1024, 4096).state == "warn"
    assert open_files(20_000, 20_000).state == "ok"
    assert shared_memory(64 * 2**20, on_gpu=True).state == "warn"  # what a container has by default
    assert shared_memory(64 * 2**20, on_gpu=False).state == "ok"
    assert [skew_of([0.0, off]).state for off in (0.01, -3.0, 900.0)] == ["ok", "warn", "fail"]
    assert "rank 1" in skew_of([0.0, -3.0]).words
    installed = {name: version(name) for name in ("torch", "torchvision", "accelerate", "deepspeed")}
    assert list(unfit(installed)) == []
    (finding,) = [one for one in unfit({**installed, "torch": "1.13"}) if one.words.startswith("accelerate")]
    assert finding.state == "fail"
    assert finding.line.endswith("asks for torch>=2.0.0, and 1.13 is here; fix: pip install 'torch>=2.0.0'")
    assert [one.state for one in unfit({"numpy": "1.26.4"})] == ["fail"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "clock"], "--only: there is no check 'clock'; nearest: clocks"),
        (["--only", "memory"], "--only: memory needs a RECIPE"),
    ],
)
def test_a_wrong_invocation_is_one_line(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["vlm", "doctor", *words])
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"vlm: {line}\n"


def test_what_fails_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run")  # there are no shards
    monkeypatch.setattr("sys.argv", ["vlm", "doctor", recipe, "--only", "sources", "--only", "clocks"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1 ok, 0 warn, 1 fail"
    assert "fail  sources" in out
