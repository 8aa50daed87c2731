"""Plans: what each engine holds by its definition, a recipe from the command line to JSON, and mistakes in one line."""

import json
from pathlib import Path

import pytest
import yaml

from launch.main import run
from launch.plan.engines import Cluster, Sizes, Unit, shares_of
from launch.plan.gpu import Gpu, gpu_named, shipped_gpus
from tests.launch.tiny import tiny_values
from vlm.errors import UserError
from vlm.training.engines.options import EngineOptions

MIB = 2**20
SIZES = Sizes(
    weights=1000 * MIB,
    trained=800 * MIB,
    small=8 * MIB,
    largest=50 * MIB,
    units=(Unit(100 * MIB, (450 * MIB, 450 * MIB)),),
)
OPTIONS = EngineOptions(bucket_mib=16)


def test_each_engine_shares_what_its_paper_says() -> None:
    """Rajbhandari et al., 2020, of fp32 weights on 4 ranks: moments 2 x trained / 4, and so on."""
    cluster = Cluster(2, 2)
    shares = {name: shares_of(name, SIZES, cluster, OPTIONS, 2) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")}
    weights = {name: share.weights / MIB for name, share in shares.items()}
    assert weights == {"ddp": 1000, "zero1": 1000, "zero2": 1000, "zero3": 258, "fsdp": 250}
    moments = {name: share.moments / MIB for name, share in shares.items()}
    assert moments == {"ddp": 1600, "zero1": 400, "zero2": 400, "zero3": 400, "fsdp": 400}
    assert shares["ddp"].reduced == 2 * 3 / 4 * 800 * MIB  # a ring's all-reduce
    assert shares["fsdp"].reduced == shares["zero2"].reduced == 3 / 4 * 800 * MIB  # and its reduce-scatter
    assert shares["fsdp"].gathers == 3 / 4 * 1000 * MIB
    by_node = shares_of("fsdp", SIZES, cluster, EngineOptions(shard_group="node"), 2)
    assert by_node.weights == 500 * MIB
    assert by_node.reduced == (1 / 2 + 2 * 1 / 2 / 2) * 800 * MIB


def test_one_rank_holds_four_copies_and_sends_nothing() -> None:
    alone = shares_of("ddp", SIZES, Cluster(1, 1), OPTIONS, 2)
    assert alone.weights + alone.moments + alone.growing * 800 * MIB == (1000 + 3 * 800) * MIB
    assert alone.reduced == alone.gathers == alone.gathered == 0


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vlm", "plan", *words])
    with pytest.raises(SystemExit) as caught:
        run()
    return int(caught.value.code or 0), *capsys.readouterr()


def test_a_recipe_is_planned_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(tmp_path / "data", tmp_path / "run", duration="1000 steps", precision="bf16")
    values["optimizer"] = {"kind": "muon"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    words = [str(tmp_path / "recipe.yaml"), "--nodes", "2", "--gpus-per-node", "3", "--gpu", "a100-40", "--price", "2"]
    code, out, err = said(monkeypatch, capsys, *words, "--engine", "fsdp", "--json", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    assert "predicted, nothing was run" in out
    assert "the bottleneck is " in out
    assert not (tmp_path / "run").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["engine"], plan["rows_per_rank"], plan["steps"]) == ("fsdp", 2, 1000)
    assert {one["engine"] for one in plan["engines"]} == {"ddp", "fsdp"}  # those that carry Muon
    way = next(one for one in plan["engines"] if one["engine"] == "fsdp" and not one["recomputed"])
    assert plan["gpu_hours"] == pytest.approx(1000 * way["seconds"] * 6 / 3600)
    assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert way["bytes"] == pytest.approx(sum(way["bytes_by_part"].values()))
    assert way["seconds"] == pytest.approx(sum(way["seconds_by_part"].values()))
    assert plan["samples_per_second"] == pytest.approx(12 / way["seconds"])
    assert {one["check"]: one["state"] for one in plan["findings"]}["data"] == "warn"  # there are no shards


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "name a RECIPE, or measure this machine with --calibrate"),
        (["scenes", "--gpu", "h10"], "--gpu: there is no 'h10' in the table; nearest: h100"),
        (["scenes", "--engine", "zero"], "--engine: there is no 'zero'; nearest: zero3, zero2, zero1"),
        (
            ["scenes", "--engine", "zero2", "optimizer.kind=lamb"],
            "of which engine zero2 has parts; it is for engine: ddp",
        ),
        (["scenes", "--nodes", "32", "--gpus-per-node", "64"], "global_batch: 128 pairs leave some of 2048 ranks"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(monkeypatch, capsys, *words)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1


def test_a_gpu_of_ones_own_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(shipped_gpus()["h100"].model_dump(mode="json") | {"name": "mine"}))
    assert gpu_named(str(own)) == shipped_gpus()["h100"].model_copy(update={"name": "mine"})
    for text, words in {
        "memory_gb: 80": "bf16_tflops: this key is required",
        "memory: 80": "memory: unknown key (value 80); nearest: memory_gb",
        "- 1": "valid dictionary",
        "a: [": "is no YAML",
    }.items():
        own.write_text(text)
        with pytest.raises(UserError, match=r"own\.yaml") as caught:
            gpu_named(str(own))
        assert words in str(caught.value)
    assert all(isinstance(gpu, Gpu) for gpu in shipped_gpus().values())
