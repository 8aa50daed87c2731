"""Evaluate one model from the command line, on all ranks that a launcher started."""

import json
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from eval.evaluator import EvaluatorConfig, build_evaluators
from launch.model_source import load_model
from vlm.atomic import write_text
from vlm.errors import UserError
from vlm.training.build_engine import start_accelerator
from vlm.world import World


def evaluate_model(name: str, config: EvaluatorConfig, json_file: Path | None) -> dict[str, float]:
    """Run one evaluator on the model called `name`; print a table and, when asked, write the figures as JSON."""
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}")
    accelerator: Accelerator = start_accelerator("ddp", rows_per_rank=1, precision="fp32", max_grad_norm=None)
    try:
        world = World.current(accelerator.device)
        model = load_model(name, world.device)
        (evaluator,) = build_evaluators({config.kind: config}, model.image_spec, model.tokenizer, None).values()
        figures = evaluator.run(model, world)
        if world.is_main:
            _show(name, config.kind, figures)
            if json_file is not None:
                write_text(
                    json_file, json.dumps({"model": name, "evaluation": config.kind, **figures}, indent=2) + "\n"
                )
        world.barrier()
    finally:
        accelerator.end_training()
    return figures


def _show(name: str, kind: str, figures: dict[str, float]) -> None:
    table = Table(title=f"{kind} of {name}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        table.add_row(key, f"{value:g}" if value == int(value) else f"{value:.4f}")
    Console().print(table)
