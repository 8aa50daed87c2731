"""What a user gets wrong of `vlm launch` is one line and exit code 2, before anything is written or asked for."""

from pathlib import Path

import pytest
import yaml

from launch.main import run
from tests.launch.tiny import tiny_values

SLURM = "--on slurm --gpus-per-node 1"
KUBERNETES = "--on kubernetes --gpus-per-node 1 --image registry.org:5000/team/vlm:1.2"
SSH = "--on ssh --gpus-per-node 1 --hostfile hosts"


@pytest.mark.parametrize("place", [SLURM, KUBERNETES, SSH])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("recipe.yaml --nodes 0", "--nodes: '0' is no number of nodes"),
        ("recipe.yaml --engine zero4", "recipe.yaml: engine: found 'zero4'; input should be 'ddp', 'fsdp', 'zero1'"),
        ("recipe.yaml engine=deepspeed", "recipe.yaml: engine: found 'deepspeed'; input should be 'ddp', 'fsdp'"),
        ("recipes.yaml", "recipe recipes.yaml: no such file, and no recipe ships under this name"),
        ("recipe.yaml --nodes 13", "global_batch: 12 pairs leave some of 13 ranks without any"),
        ("recipe.yaml run=recipe.yaml/run", "vlm launch: "),
    ],
)
def test_of_any_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    words: str,
    line: str,
) -> None:
    refused(tmp_path, monkeypatch, capsys, f"{words} {place}", line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (SLURM, "sbatch is not on the PATH; start this where it is (--dry-run prints what would be written and run)"),
        (KUBERNETES, "kubectl is not on the PATH; "),
        (SSH, "deepspeed is not on the PATH; "),
        ("--on slrum --gpus-per-node 1", "there is no place 'slrum'; nearest: slurm"),
        ("--on slurm", "--gpus-per-node: how many ranks does a node of --on slurm have?"),
        ("--on kubernetes --gpus-per-node 1", "--image: --on kubernetes needs a container image"),
        ("--on ssh --gpus-per-node 1", "--hostfile: --on ssh needs the names of its hosts, one a line"),
        (f"{SSH} --hostfile none", "--hostfile: none has 0 hosts for 1 nodes"),
        (f"{SSH} --hostfile nowhere", "--hostfile: nowhere cannot be read"),
        (f"{SSH} --transport mpich", "--transport: unknown 'mpich'; nearest: "),
        (f"{SSH} --meet gpu1", "--meet: 'gpu1' is no HOST:PORT"),
    ],
)
def test_of_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    refused(tmp_path, monkeypatch, capsys, f"recipe.yaml {words}", line)


def test_where_deepspeeds_transport_is_missing_deepspeed_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("deepspeed", "ompi_info"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    refused(tmp_path, monkeypatch, capsys, f"recipe.yaml {SSH}", "pdsh is not on the PATH; ")
    refused(tmp_path, monkeypatch, capsys, f"recipe.yaml {SSH} --transport openmpi", "mpirun is not on the PATH; ")


def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    """Assert that the command ends so on a machine that has no more programs than `bin`, and writes nothing."""
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(folder, folder / "run")))
    (folder / "hosts").write_text("".join(f"gpu{n} slots=8\n" for n in range(13)))
    (folder / "none").write_text("# nobody yet\n\n")
    monkeypatch.setenv("PATH", str(folder / "bin"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("sys.argv", ["vlm", "launch", "--program", "vlm", *words.split()])
    with pytest.raises(SystemExit) as caught:
        run()
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert said.err.startswith(f"vlm: {line}")
    assert said.err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
