"""The code of docs/how-to-add.md, run as it stands there, from a folder outside the project."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from launch.main import app
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, train_ranks, write_tiny, write_tiny_recipe
from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of
from vlm.checkpoint.format import Checkpoint
from vlm.objectives.objective import Objective
from vlm.objectives.term import Term
from vlm.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "how-to-add.md"
README = PAGE.parents[1] / "README.md"


def blocks() -> dict[str, str]:
    """The page's files by name."""
    found = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A user's folder: the page's modules beside shards, with two captions for a sample."""
    folder = tmp_path_factory.mktemp("users")
    write_tiny(folder)
    several = [with_json(n, captions=[f"a {n}", f"b {n}"][: 1 + n % 2]) for n in range(24)]
    write_shard(folder / "several.tar", several)
    for name, text in blocks().items():
        (folder / name).write_text(text)
    forget_users_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.path", [str(folder), *sys.path])  # before the folders of other tests
        yield folder
    forget_users_modules()


def forget_users_modules() -> None:
    """Other tests have modules of these names in other folders."""
    for name in blocks():
        sys.modules.pop(name.removesuffix(".py"), None)


def recipe(folder: Path, name: str, **changes: Any) -> str:
    """The tiny recipe with what the page says in `name.yaml`."""
    written = yaml.safe_load((folder / f"{name}.yaml").read_text())
    if "data" in written:
        written["data"] = {**changes.pop("data", {}), **written["data"]}
    return write_tiny_recipe(
        folder, folder / name.removesuffix(".yaml"), **{"duration": "3 steps", **changes, **written}
    )


def test_the_page_has_all_that_it_promises() -> None:
    assert set(blocks()) == {
        *(f"my_{kind}.py" for kind in ("terms", "evaluators", "editors", "towers", "engines", "optimizers", "formats")),
        *(f"{kind}.yaml" for kind in ("terms", "evaluators", "editors", "towers", "engines", "optimizers")),
    }


def verified(name: str) -> bool:
    return verify(load_recipe(name, trust=True))


@pytest.mark.slow
def test_the_terms_train_and_are_exact_on_two_ranks_in_micro_batches(folder: Path) -> None:
    data = {"sources": {"pairs": {"shards": "several.tar"}}}
    name = recipe(folder, "terms", data=data, global_batch=11, micro_batch=2)
    assert run_ranks(verified, 2, name, group=False) == [True, True]
    train_ranks(2, name)
    logged = [line for line in metrics_of(folder / "terms") if "loss" in line]
    for line in logged:
        weighted = line["clip"] + 0.1 * line["my_terms:Pull"] + 0.5 * line["all"] + 0.1 * line["caption_pull"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-6)


def test_the_terms_are_what_they_say(folder: Path) -> None:
    """Written out on a batch of three samples with one, two and one caption."""
    registry: Registry[Any] = Registry("objective", Term)
    generator = torch.Generator().manual_seed(0)
    image, captions, taught = (unit(torch.randn(n, 4, generator=generator).double()) for n in (3, 4, 3))
    owners = torch.tensor([0, 1, 1, 2])
    text = captions[[0, 1, 3]]
    outputs = outputs_of(image, text, torch.tensor([3.0]).double(), captions=captions)
    batch = batch_of(3, caption_owners=owners)
    terms = {
        name: registry.find(f"my_terms:{cls}")()
        for name, cls in {"pull": "Pull", "all": "AllCaptions", "caption_pull": "CaptionPull"}.items()
    }
    _, values = Objective(terms).evaluate(outputs, batch, teacher={"image": taught})
    assert float(values["pull"]) == pytest.approx(float((image - text).square().sum(1).mean()), rel=1e-12)
    distances = [(captions[m] - taught[owners[m]]).square().sum() for m in range(4)]
    assert float(values["caption_pull"]) == pytest.approx(float(sum(distances, torch.zeros(())) / 4), rel=1e-12)
    logits = 3 * image @ captions.T
    own = owners[None, :] == torch.arange(3)[:, None]

    def infonce(rows: Tensor, positive: Tensor) -> Tensor:
        sums = [rows[i][positive[i]].logsumexp(0) - rows[i][~positive[i]].logsumexp(0) for i in range(len(rows))]
        loss: Tensor = -logsigmoid(torch.stack(sums)).mean()
        return loss

    expected = (infonce(logits, own) + infonce(logits.T, own.T)) / 2
    assert float(values["all"]) == pytest.approx(float(expected), rel=1e-12)


def unit(rows: Tensor) -> Tensor:
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length


def test_the_editor_makes_captions_that_terms_read(folder: Path) -> None:
    captions = [f"dogs in the {('morning', 'night')[n % 2]} at place {n}" for n in range(24)]
    write_shard(folder / "times.tar", [sample(n, jpg=picture(n), txt=text) for n, text in enumerate(captions)])
    train_here(recipe(folder, "editors", data={"sources": {"times": {"shards": "times.tar"}}}))
    logged = [line for line in metrics_of(folder / "editors") if "loss" in line]
    assert len(logged) == 3
    for line in logged:
        assert line["data/counterfactual/my_editors:Daytime"] == line["data/counterfactual/word_order"] == 0.5
        terms = line["clip"] + line["counting"] + line["hard_negative_captions"]
        assert line["loss"] == pytest.approx(terms, rel=1e-6)


def test_the_evaluator_is_logged_and_run_by_its_command(folder: Path) -> None:
    train_here(recipe(folder, "evaluators"))
    spreads = [
        line["eval/spread/image_spread"]
        for line in metrics_of(folder / "evaluators")
        if "eval/spread/image_spread" in line
    ]
    assert len(spreads) == 2
    arguments = ["eval", "my_evaluators:SpreadConfig", "evaluators", "shards=train-0*.tar"]
    done = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    assert f"{spreads[-1]:.4f}" in done.output


def test_the_tower_trains_and_its_checkpoint_holds_it(folder: Path) -> None:
    train_here(recipe(folder, "towers"))
    names = Checkpoint(folder / "towers/checkpoints/step-00000003").names("weights")
    assert sum(name.startswith("image.") and ".layers." in name for name in names) == 6  # weight and bias of three


def test_the_engine_takes_the_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(recipe(folder, "engines"))
    assert len(re.findall(r"^update at \d\.\d\de-\d\d, gradient norm \d", capsys.readouterr().out, re.MULTILINE)) == 3


def test_the_optimizer_and_the_schedule_train_and_go_on_from_a_checkpoint(folder: Path) -> None:
    name = recipe(folder, "optimizers", duration="6 steps", checkpoint_every="2 steps", keep_checkpoints=None)
    train_here(name)
    lines = [line for line in metrics_of(folder / "optimizers") if "loss" in line]
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025])
    saved = Checkpoint(folder / "optimizers/checkpoints/step-00000004")
    assert saved.names("momentum_buffer")
    assert not saved.names("exp_avg")
    train_here(name, resume=str(saved.folder))
    again = [line for line in metrics_of(folder / "optimizers") if "loss" in line]
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in lines]


def test_the_format_is_written(folder: Path) -> None:
    train_here(write_tiny_recipe(folder, folder / "plain", duration="1 step"))
    done = CliRunner().invoke(app, ["export", "plain", "out", "--to", "my_formats:TorchFile"], standalone_mode=False)
    assert done.exception is None, done.output
    assert set(torch.load(folder / "out/weights.pt", weights_only=True)) >= {"logit_scale"}


def test_the_functions_of_the_readme_run() -> None:
    (block,) = re.findall(r"```python\n(from vlm\.objectives import functional.*?)```", README.read_text(), re.DOTALL)
    rows = [unit(torch.randn(n, 4)).requires_grad_() for n in (5, 5, 6, 3)]
    names = dict(zip(("image", "text", "regions", "phrases"), rows, strict=True))
    ids = {"region_ids": torch.arange(6) // 2, "phrase_ids": torch.arange(3)}
    scope: dict[str, Any] = {**names, **ids, "scale": torch.tensor([5.0])}
    exec(block, scope)
    assert scope["loss"].isfinite()
