"""Data commands on a Ray cluster of two nodes and as a Slurm array: the bytes of one machine, whatever dies."""

import math
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from data.pools.ray import RayPool
from data.pools.slurm import SlurmPool, worker_script
from launch.main import app
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.launch.saved import save_checkpoint
from tests.vlm.model.tiny import architecture
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig

# What sbatch, squeue and scancel do for one array: its tasks are processes, and the first is killed once it has begun.
SBATCH = """#!/bin/bash
echo "$*" >> {folder}/submitted
for word in "$@"; do case $word in --array=0-*) last=${{word#--array=0-}};; esac; done
: > {folder}/tasks
for task in $(seq 0 $last); do
  SLURM_ARRAY_TASK_ID=$task bash "${{@: -1}}" >> {folder}/task-$task.log 2>&1 < /dev/null &
  echo $! >> {folder}/tasks
done
echo 17
"""
SQUEUE = "#!/bin/bash\nps -o stat= -p $(paste -sd, {folder}/tasks) | grep -v Z\ntrue\n"
SCANCEL = "#!/bin/bash\nkill $(cat {folder}/tasks) 2> /dev/null; true\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of pictures, shards, and a model."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "table").mkdir()
    rows = ["path,caption"]
    for n in range(12):
        (folder / "table" / f"{n}.jpg").write_bytes(picture(n))
        rows.append(f"{n}.jpg,a picture of thing {n}")
    Image.new("RGB", (8, 8)).save(folder / "table" / "cut.png")
    (folder / "table" / "cut.png").write_bytes((folder / "table" / "cut.png").read_bytes()[:40])
    (folder / "table.csv").write_text("\n".join([*rows, "cut.png,a broken one"]) + "\n")
    for shard in range(4):
        write_shard(folder / f"web-{shard}.tar", [with_json(10 * shard + n, captions=[f"a dog {n}"]) for n in range(5)])
    write_shard(folder / "web-4.tar", [sample(90, jpg=picture(90)[:90], txt="a broken one")])
    tiny = architecture({"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}, {"layers": 1})
    save_checkpoint(folder / "run", build_model(ModelConfig.model_validate({"architecture": tiny})))
    return folder


def done_with(folder: Path, out: Path, *place: str, embedding: bool = True) -> dict[str, bytes]:
    """The files that the commands write, by name; of the index what it says, and of no file when it was written."""
    shards = str(folder / "web-*.tar")
    table, built = str(folder / "table.csv"), str(out / "built")
    filtering = ("--min-side", "0", "--min-words", "1", "--max-images-per-text", "3")
    commands = [
        ("data build", table, built, f"--root={folder / 'table'}", "--samples-per-shard=4", "--max-bad-share=0.5"),
        ("data check", shards, "--no-tokens", f"--json={out / 'check.json'}"),
    ]
    if embedding:
        commands += [
            ("data index", shards, "--fresh"),
            ("data filter", shards, f"--out={out / 'filtered'}", *filtering),
            ("embed", str(folder / "run"), shards, f"--out={out / 'embedded'}"),
        ]
    for command, *words in commands:
        result = CliRunner().invoke(app, [*command.split(), *words, *place], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    stamped = ("build-journal.jsonl", "embed-journal.jsonl", "vlm-index.json.gz")  # in another order, or with times
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".idx" and path.name not in stamped]
    return {str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT") for path in files}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine writes."""
    return done_with(folder, tmp_path_factory.mktemp("here"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Slurm's commands, first on the path; the current folder is another one."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
        (commands / name).write_text(text.format(folder=commands))
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (tmp_path / "at work").mkdir()
    monkeypatch.chdir(tmp_path / "at work")
    return commands


def ends_once(mark: Path) -> str:
    """A worker's end the first time, as for want of memory; then its work."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def slow_root(number: int) -> float:
    time.sleep(0.3)
    return math.sqrt(number)


def test_an_array_writes_what_one_machine_does(folder: Path, expected: dict[str, bytes], slurm: Path) -> None:
    words = ("--on=slurm", "--workers=1", "--sbatch=partition=cpu")
    written = done_with(folder, slurm.parent / "out", *words, embedding=False)
    assert written.items() <= expected.items()
    submitted = (slurm / "submitted").read_text().splitlines()
    assert len(submitted) == 2
    assert all("--array=0-0 " in line and " --requeue " in line and " --partition=cpu " in line for line in submitted)
    assert not list((slurm.parent / "at work").iterdir())  # nothing is left of workers


@pytest.mark.long
def test_a_task_that_is_killed_loses_nothing_and_an_array_that_ends_is_told(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.pools.slurm._LOOK_EVERY", 0.3)
    with SlurmPool(2) as pool:
        assert list(pool.in_order(ends_once, [tmp_path / "mark"])) == ["done"]
        message = (
            r"^--on slurm: array 17 has ended with work left; .*/vlm-workers-\w+ has what its tasks printed; start"
        )
        with pytest.raises(UserError, match=message):
            list(pool.in_order(ends_once, [tmp_path / "another mark"]))
    (left,) = (tmp_path / "at work").iterdir()
    assert (left / "key").stat().st_mode & 0o077 == 0


@pytest.mark.long
def test_a_ray_cluster_writes_what_one_machine_does_and_a_lost_node_loses_nothing(
    folder: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=1)
        with RayPool(cluster.address) as pool:
            indexes = sorted(folder.glob("web-*.idx"))
            for index in indexes:
                index.unlink()
            assert done_with(folder, tmp_path / "out", "--on", "ray") == expected
            assert sorted(folder.glob("web-*.idx")) == indexes
            assert pool.num_workers() == 2
            assert list(pool.in_order(ends_once, [tmp_path / "mark"])) == ["done"]
            results = pool.in_order(slow_root, range(8))
            assert next(results) == 0.0
            cluster.remove_node(second, allow_graceful=False)
            assert list(results) == [math.sqrt(n) for n in range(1, 8)]
            with pytest.raises(ValueError, match="negative"):
                list(pool.in_order(math.factorial, [-1]))
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--on", "rays"), r"^--on: there is no place to work 'rays'; nearest: ray"),
        (
            ("--on", "ray", "--ray-address", "127.0.0.1:9"),
            r"^--on ray: no cluster at 127.0.0.1:9 \(.*`ray start --head`",
        ),
        (("--on", "slurm"), r"^--on slurm: there is no sbatch on this machine; start the command where Slurm is$"),
        (("--sbatch", "time=1"), r"^--sbatch: an option of --on slurm, found --on local$"),
    ],
)
def test_what_is_not_there_ends_in_one_line(
    folder: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["data", "check", str(folder / "web-0.tar"), *words])
    with pytest.raises(UserError, match=message):
        raise result.exception or AssertionError(result.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--processes", "2"), ("--sbatch", "time=1"), ("--ray-address", "head:6379")])
def test_options_of_a_cluster_are_not_ignored_without_one(folder: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    command = ["embed", str(folder / "run"), str(folder / "web-0.tar"), "--out", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{words[0]}: an option of --on ")
    assert not (tmp_path / "out").exists()


def test_names_with_spaces_and_quotes_are_words_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a 'b' $(touch ran)"
    odd.mkdir()
    monkeypatch.chdir(odd)
    script = tmp_path / "worker.sh"
    script.write_text(worker_script("host:1", odd / "key").replace("exec ", "printf '%s\\n' \"$PWD\" "))
    printed = subprocess.run(["bash", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert (printed[0], printed[-1]) == (str(odd), str(odd / "key"))
    assert not (odd / "ran").exists()
