"""The demo: from nothing to a trained, evaluated model and its report, in one command."""

import json
import time
from pathlib import Path

from data.scenes.writer import SETTINGS_FILE
from launch.recipe import load_recipe
from launch.scenes import render_scenes
from launch.train import REPORT, train
from vlm.paths import local_path
from vlm.terminal import Terminal
from vlm.training.run_files import METRICS

RECIPE = "scenes"
NUM_TRAIN, NUM_VAL, SEED, IMAGE_SIZE = 20_000, 2_000, 0, 64


def run_demo(folder: Path) -> None:
    """Render scenes, train the `scenes` recipe on them, evaluate, report. Started again, it goes on."""
    began, folder = time.monotonic(), local_path(folder, "DIR")
    scenes, run = folder / "scenes", folder / "run"
    if not (scenes / SETTINGS_FILE).is_file():
        render_scenes(scenes, train=NUM_TRAIN, val=NUM_VAL, seed=SEED, image_size=IMAGE_SIZE)
    recipe = load_recipe(RECIPE, [f"data.root={scenes}", f"run={run}"])
    train(recipe, resume="auto")
    _print_results(scenes, run, time.monotonic() - began)


def _print_results(scenes: Path, run: Path, seconds: float) -> None:
    console = Terminal(soft_wrap=True)
    console.print(f"\nDone in {seconds / 60:.1f} minutes.")
    for name, value in sorted(_last_evaluations(run / METRICS).items()):
        console.print(f"  {name:<45} {value:.4g}")
    console.print(f"\n  scenes       {scenes}")
    console.print(f"  run          {run}")
    console.print(f"  report       {run / REPORT}   (open it in a browser)")
    console.print("\nTry next:")
    classes = f"--data '{scenes}/zeroshot-*.tar' --classes {scenes}/zeroshot-classes.json"
    console.print(f"  vlm eval zeroshot {run} {classes}")
    console.print(f"  vlm caption {run} '{scenes}/retrieval-*.tar' --method contrastive | head")
    console.print(f"  vlm export {run} --to open_clip --without-decoder {run.parent}/open_clip")
    console.print(f"  vlm train {RECIPE} data.root={scenes} run={run.parent}/longer duration='60 epochs'")


def _last_evaluations(metrics: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        last.update(
            {
                key: value
                for key, value in json.loads(line).items()
                if key.startswith("eval/") and not isinstance(value, dict)
            }
        )
    return last
