"""The evaluation of generated captions: its figures written out, on any number of ranks and in any batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from typer.testing import CliRunner

from eval.caption_metrics.scores import score_captions
from eval.captioning import CaptioningConfig
from launch.caption import caption_pictures, generation_config
from launch.evaluate import evaluate_model
from launch.main import app
from launch.model_source import load_model
from launch.recipe import load_recipe
from launch.train import train
from tests.data.small_shards import picture, with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.test_captioner import MODEL, SHORT
from tests.launch.tiny import train_here, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.errors import UserError

WORDS = ["red", "a dog on the wet grass", "two cats", "a bus"]
REFERENCES = [[f"{WORDS[(n + k) % 4]} and a tree" for k in range(1 + n % 3)] for n in range(7)]
EVALUATE = {"kind": "caption", "shards": "test-*.tar", "batch_size": 3, "generation": {"max_length": 8}}
CLASSIFY = {"kind": "generative_zeroshot", "shards": "labelled-*.tar", "classes": WORDS, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that captions its held-out pictures, one of which is broken and one without caption."""
    folder = tmp_path_factory.mktemp("captions")
    samples = [with_json(n, captions=REFERENCES[n % 7]) for n in range(20)]
    write_shard(folder / "train-00.tar", samples)
    broken, silent = with_json(7, captions=["a cut one"]), with_json(8, captions=[])
    write_shard(folder / "test-00.tar", [*samples[:7], {**broken, "jpg": picture(7)[:90]}, silent])
    changes = {**SHORT, "objective": {"clip": 1.0, "caption": 2.0}, "duration": "40 steps", "optimizer": {"lr": 0.03}}
    write_shard(folder / "labelled-00.tar", [{**one, "cls": number % 4} for number, one in enumerate(samples[:9])])
    changes |= {"checkpoint_every": "40 steps", "evaluate": {"held": EVALUATE, "classes": CLASSIFY}}
    train_here(write_tiny_recipe(folder, folder / "run", model=MODEL, **changes))
    return folder


def config(folder: Path, **changes: Any) -> CaptioningConfig:
    return CaptioningConfig.model_validate({**EVALUATE, "shards": str(folder / "test-*.tar"), **changes})


def figures(folder: Path, batch_size: int, method: str = "greedy") -> dict[str, float]:
    generation = {"max_length": 8, "method": method}
    return evaluate_model(str(folder / "run"), config(folder, batch_size=batch_size, generation=generation))


def test_the_figures_are_what_they_say(folder: Path) -> None:
    found = figures(folder, 3)
    shards = [str(folder / "test-00.tar")]
    captions = [
        one.caption.text for one in caption_pictures(str(folder / "run"), shards, generation_config({"max_length": 8}))
    ][:7]
    scores = score_captions(captions, REFERENCES)
    assert found["cider_d"] == pytest.approx(scores.cider_d, abs=1e-9)
    assert (found["bleu_4"], found["rouge_l"]) == pytest.approx((scores.bleu_4, scores.rouge_l), abs=1e-9)
    assert (found["num_images"], found["num_skipped"]) == (7, 2)
    model = load_model(str(folder / "run"))
    pictures = [torch.from_numpy(view(folder, n).copy()).permute(2, 0, 1) for n in range(7)]
    own, lengths = [], []
    for n in range(7):
        own.append(likelihood(model, pictures[n], REFERENCES[n][0]))
        lengths.append(int(model.tokenizer([REFERENCES[n][0]]).lengths) - 1)
    assert found["nll_per_token"] == pytest.approx(-sum(own) / sum(lengths), rel=1e-5)
    # Of eight captioned samples, one broken, the one half the set away shows the other image.
    first = [*(references[0] for references in REFERENCES), "a cut one"]
    others = {(n + 4) % 8: likelihood(model, pictures[n], first[(n + 4) % 8]) for n in range(7)}
    preferred = [own[n] > others[n] for n in range(7) if n in others]
    assert len(preferred) == 6
    assert found["true_image_preferred"] == pytest.approx(sum(preferred) / 6)
    with torch.no_grad():
        image = model.encode_image(torch.stack(pictures))
        text = model.encode_text(*model.tokenizer(captions))
    expected = 2.5 * (image * text).sum(1).clamp(min=0).mean()
    assert found["self_clip_score"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_shows_the_best_and_the_worst_captions(folder: Path) -> None:
    shards, name = [str(folder / "test-00.tar")], str(folder / "run")
    greedy, contrastive = (
        [one.caption for one in caption_pictures(name, shards, generation_config({"max_length": 8, "method": method}))]
        for method in ("greedy", "contrastive")
    )
    scores = score_captions([one.text for one in greedy[:7]], REFERENCES).cider_d_by_image.tolist()
    order = sorted(range(7), key=lambda number: (-scores[number], number))
    listing = json.loads((folder / "run/examples/held/examples.json").read_text())
    for kind, numbers in (("best", order[:6]), ("worst", order[::-1][:6])):
        shown = listing[kind]
        assert [one["captions"] for one in shown] == [REFERENCES[number] for number in numbers]
        assert [one["cider_d"] for one in shown] == pytest.approx([scores[number] for number in numbers], abs=1e-9)
        for one, number in zip(shown, numbers, strict=True):
            assert [made["method"] for made in one["generated"]] == ["greedy", "contrastive"]
            assert [made["text"] for made in one["generated"]] == [greedy[number].text, contrastive[number].text]
            likelihoods = [greedy[number].log_likelihood, contrastive[number].log_likelihood]
            assert [made["log_likelihood"] for made in one["generated"]] == pytest.approx(likelihoods, rel=1e-4)
            assert (folder / "run/examples/held" / one["image"]).read_bytes() == picture(number)
    page = (folder / "run/report.html").read_text()
    assert "Best captions" in page
    assert f"<em>greedy</em> {greedy[order[0]].text}" in page


def view(folder: Path, number: int) -> Any:
    from data.images.views import evaluation_view

    return evaluation_view(picture(number), load_model(str(folder / "run")).image_spec)


@torch.no_grad()
def likelihood(model: Any, image: torch.Tensor, caption: str) -> float:
    """log p of a caption, from the logits after each of its beginnings."""
    tokens, lengths = model.tokenizer([caption])
    shown = model.encode_image_and_tokens(image[None])[1]
    total = 0.0
    for place in range(1, int(lengths)):
        states = model.text(tokens[:, :place], torch.tensor([place])).tokens
        logits = model.decoder(states, shown).logits
        total += float(log_softmax(logits, dim=1)[0, tokens[0, place]])
    return total


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "contrastive", "top_k"])
def test_neither_ranks_nor_batches_change_a_figure(folder: Path, method: str) -> None:
    alone = figures(folder, 9, method)
    assert figures(folder, 2, method) == pytest.approx(alone, rel=1e-5)
    for world_size in (2, 3):
        for found in run_ranks(figures, world_size, folder, 2, method, group=False):
            assert found == pytest.approx(alone, rel=1e-5)


def test_a_run_logs_them_and_the_command_prints_them(folder: Path) -> None:
    (logged,) = [line for line in metrics_of(folder / "run") if "eval/held/cider_d" in line]
    found = figures(folder, 3)
    assert {name: logged[f"eval/held/{name}"] for name in found} == pytest.approx(found, rel=1e-5)
    assert "CIDEr-D" in (folder / "run/report.html").read_text()
    arguments = ["eval", "caption", str(folder / "run"), "--data", str(folder / "test-00.tar"), "--max-length", "8"]
    done = CliRunner().invoke(app, [*arguments, "--method", "beam", "--beams", "2"], standalone_mode=False)
    assert done.exception is None, done.output
    assert "cider_d" in done.stdout


def test_classes_are_logged_by_the_likelihood_of_their_prompts(folder: Path) -> None:
    (logged,) = [line for line in metrics_of(folder / "run") if "eval/classes/top1" in line]
    options = ["--data", str(folder / "labelled-00.tar"), "--classes", str(folder / "classes.json")]
    (folder / "classes.json").write_text(json.dumps(WORDS))
    arguments = ["eval", "generative-zeroshot", str(folder / "run"), *options, "--json", str(folder / "found.json")]
    done = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    found = json.loads((folder / "found.json").read_text())
    assert found["num_samples"] == 9
    for name in ("top1", "top5", "mean_per_class_recall", "num_samples", "num_skipped"):
        assert logged[f"eval/classes/{name}"] == pytest.approx(found[name])


def sharded(folder: Path, engine: str) -> tuple[float, float]:
    """The NLL of references, and the top-1 of classes."""
    evaluate = {"held": {**EVALUATE, "shards": str(folder / "test-*.tar")}}
    evaluate["classes"] = {**CLASSIFY, "shards": str(folder / "labelled-*.tar")}
    changes = {**SHORT, "objective": {"clip": 1.0, "caption": 2.0}, "duration": "2 steps", "evaluate": evaluate}
    run = folder / f"run-{engine}"
    name = write_tiny_recipe(folder, run, model=MODEL, engine=engine, **changes)
    train_here(name)
    logged: dict[str, Any] = {}
    for line in metrics_of(run):
        logged |= line
    return float(logged["eval/held/nll_per_token"]), float(logged["eval/classes/top1"])


@pytest.mark.long
def test_sharded_ranks_generate_and_classify_in_step(folder: Path) -> None:
    alone = sharded(folder, "ddp")
    for engine in ("zero3", "fsdp"):
        assert run_ranks(sharded, 2, folder, engine, group=False)[0] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("evaluation", [EVALUATE, CLASSIFY])
def test_a_model_without_decoder_is_one_line(folder: Path, tmp_path: Path, evaluation: dict[str, Any]) -> None:
    changes = {"model": {**MODEL, "captioner": "none"}, "evaluate": {"held": evaluation}}
    name = write_tiny_recipe(folder, tmp_path / "run", **{**changes, "duration": "1 step"})
    with pytest.raises(UserError, match=r"evaluate\.held\.kind: the model has no captioning decoder"):
        train(load_recipe(name))
    assert not (tmp_path / "run").exists()
