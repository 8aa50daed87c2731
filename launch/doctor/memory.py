"""Memory of one real step of one micro-batch on each rank, beside what the plan says."""

import os
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding
from launch.parts import engine_settings
from launch.plan.duration import Machine
from launch.plan.engines import ENGINES, Cluster
from launch.plan.gpu import Gpu
from launch.plan.plan import Question, make_plan
from launch.recipe import Recipe
from vlm.batch import Batch, Images, Texts
from vlm.model.build import build_model
from vlm.model.dual_encoder import DualEncoder
from vlm.training.assembly import assemble, build_objective
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step

_TOLERANCE = 1.25
_STEPS = 2  # moments come with the first one
_MOST_ROWS = 32  # of a step on a CPU, which takes its time
_ITSELF = 0.3e9  # that libraries take beside tensors, on a CPU


@CHECKS.register("memory")
class StepMemory(Check):
    """A step of noise under the recipe's engine, the batch being one micro-batch a rank. Collective."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        recipe, ranks = place.needed, place.world.size
        if recipe.engine not in ENGINES:
            return [Finding("memory", "warn", f"engine {recipe.engine} cannot be planned", "watch the first steps")]
        rows = min(-(-recipe.global_batch // ranks), recipe.micro_batch or recipe.global_batch)
        predicted, largest = _predicted(place, recipe, rows)
        room = _room(place)
        words = f"{rows:,} pairs at a time: {predicted / 1e9:,.2f} GB predicted, {room / 1e9:,.1f} GB are free"
        if not all(place.world.gather_objects(predicted < room)):
            fix = f"micro_batch: {largest}" if largest else "another engine (vlm plan shows which fit)"
            return [Finding("memory", "fail", f"{words}; not tried", fix)]
        unplanned = recipe.data.documents or recipe.data.degraded or recipe.data.editors
        if unplanned or not recipe.data.images:
            return [Finding("memory", "ok", f"{words}; not tried, for want of noise of that kind")]
        if place.device.type != "cuda" and rows > _MOST_ROWS:
            rows = _MOST_ROWS
            predicted, _ = _predicted(place, recipe, rows)
            words += f"; {rows} pairs: {predicted / 1e9:,.2f} GB predicted"
        measured = _step_bytes(place, _of_rows(recipe, ranks, rows))
        words += f", {measured / 1e9:,.2f} GB measured"
        is_more = measured > _TOLERANCE * predicted + (0.0 if place.device.type == "cuda" else _ITSELF)
        return [Finding("memory", "warn" if is_more else "ok", words, "a smaller micro_batch than the plan says")]


def _of_rows(recipe: Recipe, ranks: int, rows: int) -> Recipe:
    """The recipe with one micro-batch of so many rows on each rank."""
    return recipe.model_copy(update={"global_batch": ranks * rows, "micro_batch": None})


def _predicted(place: Place, recipe: Recipe, rows: int) -> tuple[float, int | None]:
    """Bytes of a rank by the plan of such a recipe, and the largest micro-batch that fits."""
    cluster = Cluster(1, place.world.size)
    question = Question(Machine(_gpu(place), cluster), samples=10**6, compared=False)
    chosen = make_plan(_of_rows(recipe, place.world.size, rows), "", question).chosen
    return chosen.memory.peak, chosen.largest_micro_batch


def _gpu(place: Place) -> Gpu:
    """This rank's device as a plan wants it; its figures of time are not looked at."""
    on_gpu = place.device.type == "cuda"
    rates = dict.fromkeys(("bf16_tflops", "fp32_tflops", "memory_gb_s", "link_gb_s", "network_gb_s"), 1.0)
    return Gpu(
        kind="gpu" if on_gpu else "cpu", memory_gb=max(_room(place) / 1e9, 0.01), reserved_gb=0.0, cores=1.0, **rates
    )


def _room(place: Place) -> float:
    if place.device.type == "cuda":
        return float(torch.cuda.mem_get_info(place.device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _step_bytes(place: Place, recipe: Recipe) -> float:
    """By how much a model and its steps raise the memory of this process, or of its GPU, at most."""
    before = _begin(place)
    assert place.accelerator is not None
    settings = engine_settings(recipe, recipe.max_grad_norm)
    model = build_model(recipe.model, recipe.seed, load_pretrained=False)
    objective = build_objective(recipe, model, 10**6, place.world)
    batch = _noise(model, settings.rows_per_rank, place.world.rank, place.device)
    state = assemble(recipe, settings, place.accelerator, model, objective)
    state.engine.warm_up(batch, objective.needs.outputs)
    plan = MicroBatchPlan(recipe.global_batch, place.world.size)
    for step in range(_STEPS):
        train_step(state, batch, plan, step, 0.0)
    if place.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(place.device))
    highest = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return int(highest) * 1024 - before


def _begin(place: Place) -> float:
    """Forget the peak so far; what is there now."""
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")
    return float(psutil.Process().memory_info().rss)


def _noise(model: DualEncoder, rows: int, rank: int, device: torch.device) -> Batch:
    size, length = model.image_spec.size, model.text.context_length
    texts = model.tokenizer(["a dog " * length] * rows)
    batch = Batch(
        step=0,
        sample_ids=torch.arange(rank * rows, (rank + 1) * rows),
        keys=("",) * rows,
        parts={
            "image": Images(torch.randint(0, 255, (rows, 3, size, size), dtype=torch.uint8)),
            "text": Texts(texts.tokens, texts.lengths),
        },
    )
    return batch.to(device)
