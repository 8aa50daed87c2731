"""The wheel puts one name into site-packages, and its command runs beside a user's own `data/` and `eval/`."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=PROJECT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; the packages it depends on are borrowed from this one."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path line adds the folder, not the `.pth` files in it: this checkout's editable install stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def someones_folder(tmp_path: Path) -> Path:
    for name in ("data", "eval", "launch"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('this is the user\\'s own package')\n")
    return tmp_path


def run_in(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlm"}
    assert "vlm/_programs/launch/recipes/flickr8k-tiny.yaml" in names
    assert any(name.startswith("vlm/_programs/eval/templates/") for name in names)
    assert not [name for name in names if name.endswith(("ruff.toml", ".pyc"))]


@pytest.mark.slow
def test_the_installed_command_runs_beside_a_users_own_packages(environment: Path, someones_folder: Path) -> None:
    command, python = (str(environment / "bin" / name) for name in ("vlm", "python"))
    done = run_in(someones_folder, command, "schema", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    assert "global_batch" in json.loads(done.stdout)["properties"]
    assert run_in(someones_folder, command, "--version").stdout.startswith("vlm ")
    where = "import vlm.__main__ as m; print(m.programs_folder())"
    for variables in ({}, {"PYTHONPATH": "."}):
        folder = run_in(someones_folder, python, "-c", where, **variables).stdout.strip()
        assert Path(folder).is_relative_to(environment)


@pytest.mark.slow
def test_the_editable_command_runs_beside_a_users_own_packages(someones_folder: Path) -> None:
    command = Path(sys.executable).with_name("vlm")
    if not command.exists():
        pytest.skip("this checkout is not installed in editable form")
    done = run_in(someones_folder, str(command), "train", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("vlm: recipe nowhere: no such file")
