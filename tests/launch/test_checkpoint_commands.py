"""Checkpoints verified, pruned and copied by commands; a store that fails in the middle has no half of one."""

import os
from pathlib import Path

import fsspec
import pytest
import torch

from data.shards.retry import RetryConfig
from launch.checkpoint_copy import copy_checkpoint, newest_stored
from tests.eval.runs import evaluated, logged, write_run
from tests.launch.flaky_store import FlakyStore, fresh_store
from tests.launch.test_command_line import said
from tests.vlm.checkpoint.test_format import flip, groups, manifest
from vlm.checkpoint.folder import complete_checkpoints, hold, let_go
from vlm.checkpoint.writer import write_checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.training.owner import Owner

QUICK = RetryConfig(attempts=4, first_wait=0.001, longest_wait=0.002, silence=5)
RECALL = "eval/held/text_to_image_r@1"


@pytest.fixture
def store() -> type[FlakyStore]:
    return fresh_store()


def a_run(path: Path, steps: tuple[int, ...] = (3, 6, 9)) -> dict[int, Path]:
    """A run with checkpoints and a figure that is best at its first one."""
    lines = [line for step in steps for line in (logged(step, 2.0), evaluated(step, {RECALL[5:]: 1 / step}))]
    run = write_run(path, lines)
    both = groups({"a": torch.arange(6.0)})
    return {step: write_checkpoint(run / "checkpoints", manifest(step), both, World()) for step in steps}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_goes_into_a_store_and_back_whatever_its_connection_does(tmp_path: Path, store: type[FlakyStore]) -> None:
    saved = a_run(tmp_path / "run")
    store.failures += ["lost", "cut"]
    there = copy_checkpoint(str(tmp_path / "run"), "flaky://bucket/kept/", QUICK)
    assert there == "flaky://bucket/kept/step-00000009"
    assert store.stored[-1] == "manifest.json"
    assert copy_checkpoint(str(saved[3]), "flaky://bucket/kept", QUICK) == "flaky://bucket/kept/step-00000003"
    for source in ("flaky://bucket/kept", there):
        back = copy_checkpoint(source, str(tmp_path / f"back-{source[-1]}"), QUICK)
        assert contents(Path(back)) == contents(saved[9])
    puts = len(store.stored)
    assert copy_checkpoint(str(saved[9]), "flaky://bucket/kept", QUICK) == there
    assert len(store.stored) == puts  # it is there already
    assert contents(Path(copy_checkpoint(str(saved[6]), str(tmp_path / "here"), QUICK))) == contents(saved[6])


def test_half_a_copy_is_none_and_damage_in_a_store_is_noticed(tmp_path: Path, store: type[FlakyStore]) -> None:
    a_run(tmp_path / "run", (3,))
    copy_checkpoint(str(tmp_path / "run"), "flaky://bucket/kept", QUICK)
    a_run(tmp_path / "other", (6,))
    for failures, words in (
        (
            ["lost"] * 9,
            r"^copy: flaky://bucket/kept/step-00000006/weights-.* cannot be written: the conn.*\(4 attempts\)",
        ),
        (["refused"], r"^copy: flaky://bucket/kept/step-00000006/weights-00000.safetensors may not be written"),
    ):
        store.failures[:] = failures
        with pytest.raises(UserError, match=words):
            copy_checkpoint(str(tmp_path / "other"), "flaky://bucket/kept", QUICK)
    store.failures.clear()
    assert newest_stored("flaky://bucket/kept", QUICK) == "flaky://bucket/kept/step-00000003"
    (name,) = [name for name in store.store if name.endswith("step-00000003/weights-00000.safetensors")]
    content = bytearray(store.store[name].getvalue())
    content[-1] ^= 1
    fsspec.filesystem("flaky").pipe_file(name, bytes(content))
    with pytest.raises(UserError, match=r"kept/step-00000003/weights-00000\.safetensors is damaged"):
        copy_checkpoint("flaky://bucket/kept", str(tmp_path / "back"), QUICK)
    assert list((tmp_path / "back").iterdir()) == []
    with pytest.raises(UserError, match="flaky://bucket/empty is neither a checkpoint nor a run with a complete one"):
        copy_checkpoint("flaky://bucket/empty", str(tmp_path / "back"), QUICK)
    with pytest.raises(UserError, match="are both in stores; one of them must be a folder of this machine"):
        copy_checkpoint("flaky://bucket/kept", "flaky://bucket/twice", QUICK)


def test_verify_looks_at_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = a_run(tmp_path / "run")
    assert said(monkeypatch, capsys, "checkpoint", "verify", str(tmp_path / "run"))[0] == 0
    flip(saved[6] / "weights-00000.safetensors", -1)
    code, out, _ = said(monkeypatch, capsys, "checkpoint", "verify", str(tmp_path / "run"), str(saved[3]))
    size = (saved[3] / "weights-00000.safetensors").stat().st_size
    lines = {step: f"ok    {saved[step]}: 1 files, {size / 1e9:.3g} GB" for step in saved}
    lines[6] = f"fail  checkpoint {saved[6]}: weights-00000.safetensors is damaged (its bytes do not match the mani"
    assert code == 1
    assert [line[:130] for line in out.splitlines()] == [lines[step][:130] for step in (3, 6, 9, 3)]


def test_prune_keeps_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, run = a_run(tmp_path / "run", (3, 6, 9, 12, 15)), str(tmp_path / "run")
    rules = ["--last", "1", "--every", "6", "--best", f"{RECALL}=1"]
    reader = hold(saved[9])
    assert reader is not None
    code, out, _ = said(monkeypatch, capsys, "checkpoint", "prune", run, "--last", "1", "--dry-run")
    assert (code, len(complete_checkpoints(tmp_path / "run/checkpoints"))) == (0, 5)
    assert out.splitlines()[0] == f"would go {saved[3]}"
    code, out, _ = said(monkeypatch, capsys, "checkpoint", "prune", run, *rules)
    assert out.splitlines() == [
        *(f"kept     {saved[step]}" for step in (3, 6)),
        f"kept     {saved[9]} (another process reads it)",
        *(f"kept     {saved[step]}" for step in (12, 15)),
    ]
    let_go(reader)
    assert f"deleted  {saved[9]}" in said(monkeypatch, capsys, "checkpoint", "prune", run, *rules)[1].splitlines()
    assert list(complete_checkpoints(tmp_path / "run/checkpoints")) == [3, 6, 12, 15]
    owner = Owner(tmp_path / "run")
    owner.take()
    for words, told in (
        (["--last", "1"], f"{run} is being written by process {os.getpid()} on "),
        (["--best", "eval/held/text_to_image_r@2=1"], f"the run did not measure it; nearest: {RECALL}"),
        (["--best", "r@1"], "prune: --best r@1: write FIGURE=COUNT, as in "),
    ):
        code, out, error = said(monkeypatch, capsys, "checkpoint", "prune", run, *words)
        assert (code, out) == (2, "")
        assert told in error
    owner.release()
