"""Scripts and manifests say what was asked for, pass their own checkers, and carry any text of a user unharmed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch.main import run
from launch.nodes.job import Job, Nodes, job_name
from launch.nodes.kubernetes import Kubernetes
from launch.nodes.local import Local
from launch.nodes.options import PlaceOptions
from launch.nodes.place import PLACES
from launch.nodes.slurm import Slurm
from launch.nodes.ssh import Ssh
from tests.launch.tiny import tiny_values
from vlm.errors import UserError

ODD = "a b'c\"d$(touch HIT)`touch HIT`;touch HIT&\\|>HIT é"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


def job(folder: Path, nodes: str = "2:4", **changes: Any) -> Job:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(folder, folder / "run")))
    values: dict[str, Any] = {
        "recipe": str(recipe),
        "overrides": (f"data.root={ODD}",),
        "flags": (),
        "nodes": Nodes.parse(nodes),
        "ranks": 8,
        "run": folder / "run",
        "name": "run",
        "program": ("/opt/vlm env/bin/vlm",),
    }
    return Job(**{**values, **changes})


def checked(script: str, folder: Path) -> None:
    path = folder / "script.sh"
    path.write_text(script)
    done = subprocess.run([SHELLCHECK, "--severity=style", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


SLURM = [
    {},
    {"partition": "gpu,long", "account": "a", "time": "1-12:00:00", "cpus_per_node": 64, "sbatch": ["constraint=h100"]},
    {"container": "/img/v.sif", "mount": ["/data"], "cache": "/scratch/cache", "time": "1-0"},
    {"container": "nvcr.io#a/b:1", "mount": ["/data:/mnt"]},
]


@pytest.mark.parametrize("options", SLURM)
def test_a_batch_script_passes_shellcheck_and_says_what_was_asked(tmp_path: Path, options: dict[str, Any]) -> None:
    place = Slurm(job(tmp_path), PlaceOptions(**options))
    (written,) = place.files()
    checked(written.text, tmp_path)
    lines = written.text.splitlines()
    for line in ("nodes=2-4", "ntasks-per-node=1", "gpus-per-node=8", "signal=B:USR1@240", "requeue", "no-kill"):
        assert f"#SBATCH --{line}" in lines
    assert lines[0].startswith("#!")
    if "partition" in options:
        assert {"#SBATCH --partition=gpu,long", "#SBATCH --constraint=h100", "#SBATCH --time=1-12:00:00"} <= set(lines)
    assert ("data.cache.folder=/scratch/cache" in written.text) == ("cache" in options)


def test_what_a_user_wrote_reaches_the_nodes_as_it_is(tmp_path: Path) -> None:
    """The script is run by bash, with an srun that prints its words."""
    (written,) = Slurm(job(tmp_path), PlaceOptions(cache="/scratch/é b")).files()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "srun": f"exec {shlex.quote(sys.executable)} -c 'import json,sys; print(json.dumps(sys.argv[1:]))' \"$@\"",
        "scontrol": "echo first; echo second",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "12001", "SLURM_JOB_NODELIST": "x"}
    environment["SLURM_CPUS_ON_NODE"] = "9"
    done = subprocess.run(
        ["bash", "-c", written.text], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    words = json.loads(done.stdout)
    assert f"data.root={ODD}" in words
    assert "data.cache.folder=/scratch/é b" in words
    assert words[-2:] == ["--meet", "first:20001"]
    assert "--cpus-per-task=9" in words
    assert not list(tmp_path.rglob("HIT*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "gpu\n#SBATCH --uid=0"}, "--partition: "),
        ({"account": "a b"}, "--account: "),
        ({"time": "soon"}, "--time: "),
        ({"time": "5"}, "--time: 5 leaves no time to train: 240 s before its end the run saves"),
        ({"time": "5:00"}, "--time: 5:00 leaves no time"),
        ({"time": "0-0:04:59"}, "--time: 0-0:04:59 leaves no time"),
        ({"sbatch": ["nodes=7"]}, "--sbatch: nodes is what vlm launch says itself"),
        ({"sbatch": ["wrap=a;b"]}, "--sbatch: "),
        ({"mount": ["/x"]}, "--mount says what a container sees"),
        ({"cache": "$TMPDIR/x"}, "--cache: "),
    ],
)
def test_what_no_line_of_a_batch_script_may_hold_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Slurm(job(tmp_path), PlaceOptions(**options)).files()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workload", ["pytorchjob", "job"])
def test_a_manifest_is_valid_and_starts_the_nodes(tmp_path: Path, workload: str) -> None:
    options = PlaceOptions(image="registry/vlm:1", namespace="team", volume=["shared:/work"], workload=workload)
    launched = job(tmp_path, program=("vlm",))
    (written,) = Kubernetes(launched, options).files()
    objects = list(yaml.safe_load_all(written.text))
    recipe = yaml.safe_load(objects[0]["data"]["recipe.yaml"])
    assert recipe["data"]["root"] == ODD  # what was overridden is in the recipe that goes along
    for one in objects:
        assert one["metadata"]["namespace"] == "team"
        if one["kind"] != "PyTorchJob":
            kubernetes_validate.validate(one, "1.30", strict=True)
    if workload == "job":
        assert [one["kind"] for one in objects] == ["ConfigMap", "Service", "Job"]
        pods = [objects[2]["spec"]["template"]]
        assert (objects[2]["spec"]["completions"], objects[2]["spec"]["completionMode"]) == (4, "Indexed")
        meet = "run-0.run:29400"
    else:
        replicas = objects[1]["spec"]["pytorchReplicaSpecs"]
        assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 3}
        assert {one["restartPolicy"] for one in replicas.values()} == {"ExitCode"}
        pods = [one["template"] for one in replicas.values()]
        assert {pod["spec"]["containers"][0]["name"] for pod in pods} == {"pytorch"}  # the operator looks for it
        meet = "run-master-0:29400"
    for pod in pods:
        as_pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        kubernetes_validate.validate(as_pod, "1.30", strict=True)
        (container,) = pod["spec"]["containers"]
        assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
        assert container["command"][:3] == ["vlm", "launch", "/etc/vlm/recipe.yaml"]
        assert container["command"][-2:] == ["--meet", meet]
        assert pod["spec"]["terminationGracePeriodSeconds"] > launched.grace


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image": "a b"},
        {"image": "IMAGE"},
        {"image": "registry.org/team/VLM:1"},
        {"image": "i" * 600},
        {"image": "i", "namespace": "A_B"},
        {"image": "i", "volume": ["x"]},
        {"image": "i", "volume": ["CLAIM:/work"]},
        {"image": "i", "workload": "x"},
    ],
)
def test_what_is_no_name_in_a_manifest_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--(image|namespace|volume|workload)"):
        Kubernetes(job(tmp_path), PlaceOptions(**options))


def test_by_ssh_deepspeeds_launcher_starts_a_script_a_host(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("gpu1 slots=8\n# a comment\ngpu2\n")
    place = Ssh(job(tmp_path, "2"), PlaceOptions(hostfile=str(hosts)))
    hostfile, script = place.files()
    assert hostfile.text == "gpu1 slots=1\ngpu2 slots=1\n"
    checked(script.text, tmp_path)
    words = shlex.split(script.text.partition("exec ")[2].replace("\\\n", " "), comments=False)
    assert f"data.root={ODD}" in words
    assert words[0] == "/opt/vlm env/bin/vlm"
    assert place.command()[-1] == str(script.path)
    assert "\n" not in place.command_words()
    for text in ("gpu1\ngpu1\n", "gpu1;reboot\ngpu2\n", "gpu1\n"):
        hosts.write_text(text)
        with pytest.raises(UserError, match="--hostfile"):
            Ssh(job(tmp_path, "2"), PlaceOptions(hostfile=str(hosts)))


def test_here_the_printed_line_is_torchruns_own(tmp_path: Path) -> None:
    """What is printed is read by a shell, and then by torchrun's parser, into the command of each rank."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext  # noqa: F401 - the macros' home
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import config_from_args, get_args_parser

    shown = Local(job(tmp_path, overrides=(f"data.root={ODD}$$",)), PlaceOptions(meet="127.0.0.1:29400")).shown()
    words = shlex.split(shown.replace("\\\n", " "))
    words = words[words.index("torchrun") :]
    config, program, arguments = config_from_args(get_args_parser().parse_args(words[1:]))
    assert isinstance(config, LaunchConfig)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 4, 8, 100)
    assert program == "/opt/vlm env/bin/vlm"
    assert [word.replace("$$", "$") for word in arguments][2:] == [f"data.root={ODD}$$", "--resume", "auto"]


@pytest.mark.parametrize(
    ("nodes", "meet", "words"),
    [
        ("0", None, "--nodes: '0' is no number of nodes"),
        ("4:2", None, "--nodes: '4:2'"),
        ("two", None, "--nodes: 'two'"),
        ("2", None, "with --meet HOST:PORT"),
        ("2", "gpu1", "--meet: 'gpu1' is no HOST:PORT"),
        ("2", "gpu1:0", "--meet: 'gpu1:0' is no HOST:PORT"),
        ("2", "gpu 1:5", "--meet: "),
    ],
)
def test_where_nodes_meet_is_asked_for(tmp_path: Path, nodes: str, meet: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Local(job(tmp_path, nodes), PlaceOptions(meet=meet))


def test_options_of_another_place_are_refused() -> None:
    with pytest.raises(UserError, match="--partition means nothing with --on local; its own options: --meet"):
        PlaceOptions(partition="gpu").require_taken("local", PLACES.find("local"))
    assert set(PLACES.names()) == {"local", "slurm", "kubernetes", "ssh"}


def test_a_name_is_one_for_every_scheduler() -> None:
    assert job_name(None, Path("runs/My Run_1")) == "my-run-1"
    assert job_name("a-1", Path("x")) == "a-1"
    with pytest.raises(UserError, match="--name"):
        job_name("A;b", Path("x"))


def test_a_dry_run_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = job(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ["launch", launched.recipe, "--nodes", "2", "--gpus-per-node", "4", "--on", "slurm", "--program", "vlm"]
    monkeypatch.setattr("sys.argv", ["vlm", *words, "--engine", "zero2", "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        run()
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("#!/usr/bin/env bash\n")
    assert "engine=zero2" in out
    assert f"# then: sbatch {tmp_path / 'run.sbatch'}" in out
    assert sorted(tmp_path.rglob("*")) == before
