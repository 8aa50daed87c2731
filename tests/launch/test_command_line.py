"""The command line itself: a mistake in it is one line, and every number has its bounds."""

import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import typer

from eval.evaluator import EVALUATORS
from launch.eval_commands import eval_app
from launch.main import app, run
from vlm import __version__


def callbacks(group: typer.Typer) -> Iterator[Callable[..., Any]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from callbacks(inner.typer_instance)


def test_every_number_has_a_least_and_a_greatest_value() -> None:
    numbers = 0
    for callback in callbacks(app):
        for name, hint in typing.get_type_hints(callback, include_extras=True).items():
            if typing.get_origin(hint) is not typing.Annotated:
                continue
            kind, info = typing.get_args(hint)[:2]
            if {"int", "float"} & set(str(kind).replace("[", " ").replace("]", " ").replace("'", " ").split()):
                numbers += 1
                assert info.min is not None, (callback, name)
                assert info.max is not None, (callback, name)
    assert numbers > 20


def test_every_kind_of_evaluation_has_a_command() -> None:
    import_module("eval.recipe")
    commands = {command.callback.__name__ for command in eval_app.registered_commands if command.callback}
    assert EVALUATORS.all()
    assert EVALUATORS.all().keys() <= commands


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vlm", *words])
    with pytest.raises(SystemExit) as caught:
        run()
    return int(caught.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--resum", "auto"], "vlm: train: No such option: --resum (Possible options: --resume)"),
        (["train"], "vlm: train: Missing argument 'RECIPE'."),
        (["evl"], "vlm: No such command 'evl'. Did you mean 'eval'?"),
        (["data", "index", "--workers", "99999", "a.tar"], "vlm: data index: Invalid value for '--workers'"),
        (["eval", "retrieval", "m", "--data", "a.tar", "--batch-size", "x"], "vlm: eval retrieval: Invalid value for"),
        (["data", "check", "pipe:false"], "vlm: SHARDS: pipe:false is a command, whose output has no index"),
        (["recipes", "scens"], "vlm: recipe scens: no such file, and no recipe ships under this name; nearest: scenes"),
    ],
)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    code, out, err = said(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_version_and_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(monkeypatch, capsys, "--version") == (0, f"vlm {__version__}\n", "")
    code, out, _ = said(monkeypatch, capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "coca-2b",
        "coca-base",
        "coca-large",
        "coca-tiny",
        "flickr8k-tiny",
        "scenes",
        "text-only-captions",
    ]
    code, out, _ = said(monkeypatch, capsys, "recipes", "scenes")
    assert out.startswith("# The demo: ")
    assert "timm_model_name: test_nfnet" in out
