"""`vlm replay`: one step of a run once more, and where in it the first number is that is not finite."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.model_source import empty_model_of
from launch.parts import engine_settings, open_stream
from launch.recipe import Recipe, settled
from launch.shown_progress import shown_progress
from vlm.batch import Batch
from vlm.checkpoint.folder import complete_checkpoints
from vlm.checkpoint.format import Checkpoint
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.errors import EveryRankError, UserError
from vlm.json_lines import read_lines
from vlm.model.build import build_model
from vlm.model.dual_encoder import DualEncoder
from vlm.paths import write_output
from vlm.progress import report_progress
from vlm.terminal import Terminal
from vlm.training.anomaly import Finding, find_first
from vlm.training.assembly import assemble, build_objective
from vlm.training.hooks.spikes import ROLLED_BACK
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.run_files import CHECKPOINTS, METRICS
from vlm.training.schedule import LearningRate
from vlm.training.state import restore_memory, restore_state
from vlm.training.step import TrainState, train_step
from vlm.training.together import ranks_together

_SHOWN = 8


def replay(recipe: Recipe, step: int, *, trust: bool = False, json_file: Path | None = None) -> list[Finding]:
    """What each rank finds in step `step` (counted from 1) of the run in `recipe.run`, left as it is. Collective.

    The steps from the newest checkpoint before it on are taken as the run took them, on any number of ranks.

    Raises:
        EveryRankError: the run has no such step.
    """
    recipe, run = settled(recipe), Path(recipe.run)
    settings = engine_settings(recipe, recipe.max_grad_norm)
    with ranks_together(settings, patience=Patience(recipe.data.patience)) as (accelerator, _):
        world = World.current(accelerator.device)
        saved, done = world.gather_objects(_way_to(run, step) if world.is_main else None)[0]
        checkpoint = None if saved is None else Checkpoint(saved)
        model = _model(recipe, checkpoint, trust=trust)
        source = open_stream(recipe, model, world, record=False)
        objective = build_objective(recipe, model, source.num_samples, world)
        if step > objective.facts.num_steps:
            raise EveryRankError(f"--step {step}: the run has {objective.facts.num_steps} steps")
        attention = () if checkpoint is None else checkpoint.manifest.attention
        state = assemble(recipe, settings, accelerator, model, objective, attention)
        if checkpoint is not None:
            _restore(state, checkpoint)
            source.restore(checkpoint.manifest.stream)
            if checkpoint.manifest.world_size == world.size:
                torch.set_num_threads(checkpoint.manifest.threads)
        rate = LearningRate.of_run(
            recipe.schedule,
            recipe.optimizer.lr,
            global_batch=recipe.global_batch,
            num_samples=source.num_samples,
            num_steps=objective.facts.num_steps,
        )
        with shown_progress(is_main=world.is_main):
            batch = _go_to(state, source.batches(done, step - done), recipe, rate)
            finding = find_first(state, batch, _plan(recipe, state), recipe.seed)
        findings: list[Finding] = world.gather_objects(finding)
        keys: list[Sequence[str]] = world.gather_objects(batch.keys)
        if world.is_main:
            _show(recipe.run, step, done, checkpoint, findings, keys)
            if json_file is not None:
                write_output(json_file, json.dumps(_as_json(step, findings, keys), indent=2) + "\n", "--json")
    return findings


def _way_to(run: Path, step: int) -> tuple[Path | None, int]:
    """The checkpoint from which to go on to a step, and how many steps are done there; None: from the first weights.

    A roll-back between it and the step has left the state of an earlier one.
    """
    saved = {done: path for done, path in complete_checkpoints(run / CHECKPOINTS).items() if done < step}
    newest = max(saved, default=0)
    lines = read_lines(run / METRICS).records
    backs = {line["step"]: line[ROLLED_BACK] for line in lines if ROLLED_BACK in line and newest < line["step"] < step}
    if backs:
        last = max(backs)
        if backs[last] not in saved:
            raise UserError(f"--step {step}: the run went back to step {backs[last]}, whose checkpoint is gone")
        return saved[backs[last]], last
    return saved.get(newest), newest


def _model(recipe: Recipe, checkpoint: Checkpoint | None, *, trust: bool) -> DualEncoder:
    if checkpoint is None:
        return build_model(recipe.model, recipe.seed)
    return empty_model_of(checkpoint, trust=trust)


def _restore(state: TrainState, checkpoint: Checkpoint) -> None:
    restore_state(checkpoint, state.engine, state.ema, state.teacher)
    restore_memory(checkpoint, state.objective)
    if state.spikes is not None:
        state.spikes.restore(checkpoint.manifest.spikes)


def _plan(recipe: Recipe, state: TrainState) -> MicroBatchPlan:
    return MicroBatchPlan(recipe.global_batch, state.engine.world.size, recipe.micro_batch)


def _go_to(state: TrainState, batches: Iterator[Batch], recipe: Recipe, rate: LearningRate) -> Batch:
    """Take all steps but the last, whose batch is returned. Collective."""
    engine = state.engine
    engine.module.train()
    left: Batch | None = None
    for number, batch in enumerate(batches):
        on_device = batch.to(engine.world.device)
        if left is None:
            engine.warm_up(on_device, state.objective.needs.outputs)
        else:
            train_step(state, left, _plan(recipe, state), recipe.seed, rate(left.step))
            report_progress("steps before", number, number)
        left = on_device
    assert left is not None
    return left


def _show(
    run: str,
    step: int,
    done: int,
    checkpoint: Checkpoint | None,
    findings: Sequence[Finding],
    keys: Sequence[Sequence[str]],
) -> None:
    console = Terminal(soft_wrap=True)
    begin = "the first weights" if checkpoint is None else f"the checkpoint of step {checkpoint.manifest.step}"
    ranks = f"{len(findings)} rank{'s' if len(findings) > 1 else ''}"
    console.print(f"step {step} of {run}, from {begin} and {step - 1 - done} steps since, on {ranks}")
    for rank, finding in enumerate(findings):
        for line in lines_of(finding):
            console.print(f"rank {rank}: {line}")
    every = [key for one in keys for key in one]
    shares = [share for finding in findings for share in finding.shares]
    if len(shares) == len(every) and all(map(math.isfinite, shares)):
        largest = sorted(zip(every, shares, strict=True), key=lambda one: -one[1])[:_SHOWN]
        words = ", ".join(f"{key} {share:.1%}" for key, share in largest)
        console.print(f"largest parts of the contrastive loss: {words}")
    more = f" and {len(every) - _SHOWN:,} more (--json)" if len(every) > _SHOWN else ""
    console.print(f"samples: {', '.join(every[:_SHOWN])}{more}")


def lines_of(finding: Finding) -> list[str]:
    """A finding in words."""
    lines = []
    if finding.forward is not None:
        lines.append(f"the first output that is not finite is of layer {finding.forward}")
    for name, value in finding.terms.items():
        lines.append(f"the term {name} is {value}")
    if finding.backward is not None:
        before = f"; the last finite one was at {finding.last_finite}" if finding.last_finite else ""
        by = f", made by {finding.function}" if finding.function else ""
        lines.append(f"the first gradient that is not finite is at {finding.backward}{by}{before}")
    if finding.samples:
        shown = ", ".join(finding.samples[:_SHOWN])
        more = f" and {len(finding.samples) - _SHOWN:,} more" if len(finding.samples) > _SHOWN else ""
        lines.append(f"samples with an embedding that is not finite: {shown}{more}")
    return lines or [f"all is finite; its part of the loss is {finding.loss:.6g}"]


def _as_json(step: int, findings: Sequence[Finding], keys: Sequence[Sequence[str]]) -> Mapping[str, Any]:
    ranks = [{"keys": list(own), **asdict(finding)} for finding, own in zip(findings, keys, strict=True)]
    return {"step": step, "ranks": ranks}
