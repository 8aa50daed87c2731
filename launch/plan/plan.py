"""The plan of a run: what a rank holds under each engine, what a step takes, and what will not work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.findings import Finding
from launch.parts import rows_per_rank
from launch.plan.data_facts import facts_of, num_samples
from launch.plan.duration import Machine, StepTime, step_time
from launch.plan.engines import ENGINES, Shares, Sizes, shares_of
from launch.plan.feasible import findings_of
from launch.plan.gpu import GIGA
from launch.plan.memory import Load, Memory, batch_bytes, memory_of, pair_work, state_bytes
from launch.plan.model import PlannedModel, parts_with_blocks, plan_model
from launch.recipe import Recipe
from vlm.errors import EveryRankError
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.options import LAYOUTS
from vlm.training.engines.start import require_options

_DAY, _HOUR = 86_400.0, 3_600.0


@dataclass(frozen=True)
class Question:
    """What a user asks beside the recipe: where it runs, under which engine, and what nobody can look up.

    Unless other ways are `compared`, the plan has those of the recipe's own engine and activations alone.
    """

    machine: Machine
    engine: str | None = None
    price: float | None = None
    samples: int | None = None
    length: int | None = None
    compared: bool = True


@dataclass(frozen=True)
class Way:
    """One way to run: an engine, and the parts of the model whose blocks are computed again in the backward.

    `kept` are the bytes that the graph of a micro-batch holds between forward and backward, by part of the model.
    """

    engine: str
    recomputed: tuple[str, ...]
    memory: Memory
    fits: bool
    largest_micro_batch: int | None
    time: StepTime
    kept: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """Everything that is told of a run before it starts; all figures are predictions."""

    recipe: str
    machine: Machine
    precision: str
    sizes: Sizes
    length: int
    load: Load
    chosen: Way
    ways: Sequence[Way]
    findings: Sequence[Finding]
    num_steps: int | None
    price: float | None
    logits: float = 0.0

    @property
    def samples_a_second(self) -> float:
        """Of all ranks."""
        return self.load.global_batch / self.chosen.time.seconds

    @property
    def mfu(self) -> float:
        """The model's own FLOPs, without what is computed again, as a share of the peak."""
        peak = self.machine.gpu.peak_rate("bf16" if self.precision == "bf16" else "fp32")
        return self.chosen.time.model_flops / self.chosen.time.seconds / peak

    @property
    def days(self) -> float | None:
        """Of the whole run; None where nobody knows how long an epoch is."""
        return None if self.num_steps is None else self.num_steps * self.chosen.time.seconds / _DAY

    @property
    def gpu_hours(self) -> float | None:
        """Of all GPUs together."""
        return None if self.days is None else self.days * _DAY / _HOUR * self.machine.cluster.ranks

    @property
    def cost(self) -> float | None:
        """At the price of a GPU-hour, where one was given."""
        return None if self.gpu_hours is None or self.price is None else self.gpu_hours * self.price


def make_plan(recipe: Recipe, name: str, question: Question) -> Plan:
    """The plan of a recipe.

    Raises:
        UserError: it cannot be run there at all: fewer pairs than ranks, an engine without the recipe's options or not
            for its optimizer, or a model or an objective that cannot be built.
    """
    if recipe.precision == "auto":
        recipe = recipe.model_copy(update={"precision": question.machine.gpu.faster_precision})
    if question.engine is not None:
        recipe = recipe.model_copy(update={"engine": question.engine})
        _require_optimizer(recipe)
    rows = rows_per_rank(recipe.global_batch, question.machine.cluster.ranks)
    require_options(EngineSettings(recipe.engine, rows, options=recipe.engine_options))
    facts = facts_of(recipe)
    samples = question.samples or num_samples(facts)
    said = tuple(recipe.activation_checkpointing)
    variants = _recomputed(recipe) if question.compared else [said]
    engines = dict.fromkeys((*_carrying(recipe), recipe.engine)) if question.compared else [recipe.engine]
    models = {parts: plan_model(recipe, parts, samples=samples, length=question.length) for parts in variants}
    load = Load(rows, min(rows, recipe.micro_batch or rows), recipe.global_batch)
    ways = {
        (engine, parts): way_of(recipe, question.machine, engine, parts, model, load)
        for engine in engines
        for parts, model in models.items()
    }
    chosen, model = ways[recipe.engine, said], models[said]
    findings = findings_of(recipe, question.machine, load, facts, chosen.time, model.image_size)
    is_known = recipe.duration.unit != "epochs" or samples is not None
    return Plan(
        recipe=name,
        machine=question.machine,
        precision=recipe.decided_precision,
        sizes=model.sizes,
        length=model.length,
        load=load,
        chosen=chosen,
        ways=list(ways.values()),
        findings=[_fit(chosen, ways.values(), question.machine.gpu.room), *findings, *_left_out(recipe)],
        num_steps=recipe.duration.steps(recipe.global_batch, samples or 1) if is_known else None,
        price=question.price,
        logits=model.logits,
    )


def _require_optimizer(recipe: Recipe) -> None:
    """Raise EveryRankError for an optimizer that would not be right under the recipe's engine."""
    words = recipe.optimizer.unfit_for(recipe.engine, LAYOUTS[recipe.engine], recipe.engine_options)
    if words is not None:
        raise EveryRankError(words)


def _carrying(recipe: Recipe) -> list[str]:
    """The engines that the recipe's optimizer works under."""
    return [name for name in ENGINES if LAYOUTS[name] in recipe.optimizer.layouts]


def _recomputed(recipe: Recipe) -> list[tuple[str, ...]]:
    """What the recipe says, and beside it the other end: all blocks computed again, or none."""
    said = tuple(recipe.activation_checkpointing)
    return list(dict.fromkeys([said, () if said else parts_with_blocks(recipe)]))


def way_of(
    recipe: Recipe, machine: Machine, engine: str, parts: tuple[str, ...], model: PlannedModel, load: Load
) -> Way:
    """One way to run a recipe, whose model was planned with these parts computed again."""
    shares = shares_of(engine, model.sizes, machine.cluster, recipe.engine_options, model.moments)
    memory = _memory_of(recipe, machine, model, shares, load)
    sizes = sorted({load.rows, *(2**power for power in range(load.rows.bit_length()))})
    fitting = [
        size
        for size in sizes
        if _memory_of(recipe, machine, model, shares, Load(load.rows, size, load.global_batch)).peak <= machine.gpu.room
    ]
    return Way(
        engine=engine,
        recomputed=parts,
        memory=memory,
        fits=memory.peak <= machine.gpu.room,
        largest_micro_batch=max(fitting, default=None),
        time=step_time(machine, recipe, model.objective, model.work, shares, load, model.averages),
        kept=model.work.kept(load.micro_batch),
    )


def _memory_of(recipe: Recipe, machine: Machine, model: PlannedModel, shares: Shares, load: Load) -> Memory:
    on_gpu, ranks = machine.gpu.kind == "gpu", machine.cluster.ranks
    pairs = pair_work(model.objective, recipe.comparison, load, ranks, on_gpu=on_gpu)
    held = {
        "batch": batch_bytes(load.rows, model.image_size, model.length),
        "memory of terms": state_bytes(model.objective),
    }
    return memory_of(shares, model.work, load, pairs, held=held, averages=model.averages, on_gpu=on_gpu)


def _fit(chosen: Way, ways: Iterable[Way], room: float) -> Finding:
    """Whether the chosen way fits, and which would where it does not."""
    peak = f"{chosen.memory.peak / GIGA:,.1f} GB of {room / GIGA:,.1f} GB a rank, most in the {chosen.memory.phase}"
    if chosen.fits:
        return Finding("memory", "ok", peak)
    smaller = chosen.largest_micro_batch
    others = [f"engine {way.engine}{' with blocks computed again' * bool(way.recomputed)}" for way in ways if way.fits]
    fix = f"micro_batch: {smaller}" if smaller else (others[0] if others else "more or larger GPUs, or a smaller model")
    return Finding("memory", "fail", peak, fix)


def _left_out(recipe: Recipe) -> list[Finding]:
    """What a recipe's steps hold that no plan has."""
    data = recipe.data
    named = {"documents": data.documents, "degraded copies": data.degraded, "counterfactuals": data.editors}
    findings = [
        Finding("left out", "warn", f"{name} come on top: a plan has pairs alone", "leave room for them")
        for name, value in named.items()
        if value
    ]
    if recipe.image_schedule:
        words = "the stages of image_schedule take less: every step is planned as the last ones are"
        findings.append(Finding("left out", "warn", words, "take time and cost as the most that they can be"))
    return findings
