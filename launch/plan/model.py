"""A recipe's model as a plan knows it: sizes, and the work of a micro-batch, without its memory."""

from dataclasses import dataclass

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from launch.plan.engines import Sizes, sizes_of
from launch.plan.trace import trace_step
from launch.plan.work import Work
from launch.recipe import Recipe
from vlm.distributed.world import World
from vlm.errors import EveryRankError, reason
from vlm.model.activations import checkpoint_activations
from vlm.model.attach import freeze_unreached
from vlm.model.build import build_shapes
from vlm.model.dual_encoder import DualEncoder
from vlm.model.token_likelihood import CHUNK_LOGITS
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.similarity.exchange import Exchange
from vlm.training.optimizers.maker import moment_bytes

_TRACED = (8, 16)  # rows; what a step takes grows by a straight line from there
_USUAL_SAMPLES = 10**6
_BYTES = 4
_ASKS_FOR_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class PlannedModel:
    """A model's sizes, its work with the blocks of some parts computed again, and the objective that it is trained by.

    Texts have `length` tokens, and `logits` are the bytes of a chunk of them under a decoder. `averages` are copies of
    the weights beside them: of the EMA, and of the teacher; `moments` are the bytes that the optimizer keeps of each
    byte that trains.
    """

    sizes: Sizes
    work: Work
    objective: Objective
    image_size: int
    length: int
    logits: float
    averages: int
    moments: float


def plan_model(recipe: Recipe, recomputed: tuple[str, ...], *, samples: int | None, length: int | None) -> PlannedModel:
    """The model of a recipe, whose blocks in these parts are computed again in the backward.

    An epoch has so many `samples` (None: a million, for what remembers samples); texts have `length` tokens (None: all
    that the tower reads). Raises UserError for a model or an objective that cannot be built.
    """
    model, shapes = build_shapes(recipe.model)
    samples, length = samples or _USUAL_SAMPLES, length or model.text.context_length
    objective = _objective(recipe, model, samples)
    outputs = objective.needs.outputs
    if model.decoder is not None:
        with shapes():
            freeze_unreached(model, outputs)
    checkpoint_activations(model, recomputed)
    try:
        traces = [trace_step(model, shapes, outputs, rows, length, recipe.decided_precision) for rows in _TRACED]
    except _ASKS_FOR_VALUES as error:
        raise EveryRankError(f"model: cannot be planned: its forward asks for values ({reason(error)})") from error
    sizes = sizes_of(model)
    return PlannedModel(
        sizes=sizes,
        work=Work(*traces),
        objective=objective,
        image_size=model.image_spec.size if recipe.data.images else 0,
        length=length,
        logits=0.0 if model.decoder is None else float(CHUNK_LOGITS * _BYTES),
        averages=(recipe.ema is not None) + bool(objective.needs.teacher_outputs),
        moments=moment_bytes(recipe.optimizer, model) / max(1, sizes.trained),
    )


def parts_with_blocks(recipe: Recipe) -> tuple[str, ...]:
    """The parts of a recipe's model whose blocks can be computed again."""
    model, _ = build_shapes(recipe.model)
    owners = {"image": model.image, "text": model.text, "captioner": model.decoder}
    return tuple(name for name, owner in owners.items() if owner is not None and owner.blocks())


def _objective(recipe: Recipe, model: DualEncoder, samples: int) -> Objective:
    world = World()
    similarity = recipe.comparison.model_copy(update={"group_ranks": None})  # of one rank there are no groups
    num_steps = recipe.duration.steps(recipe.global_batch, samples)
    per_epoch = max(1, samples // recipe.global_batch)
    facts = RunFacts(model.embed_dim, samples, num_steps, per_epoch, recipe.seed, world)
    return Objective(recipe.objective, recipe.providers, Exchange(world, similarity), facts)
