"""Render the scenes data set with a progress bar."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.scenes.writer import ScenesSummary, write_scenes
from vlm.terminal import Terminal


def render_scenes(folder: Path, *, train: int, val: int, seed: int, image_size: int) -> ScenesSummary:
    """Write the shards and say what was written."""
    console = Terminal()
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("rendering", total=None)
        summary = write_scenes(
            folder,
            train=train,
            val=val,
            seed=seed,
            image_size=image_size,
            progress=lambda count: bar.update(task, advance=count),
        )
    console.print(f"scenes: {folder}", soft_wrap=True)
    return summary
