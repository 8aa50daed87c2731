"""`vlm embed --on ray` and `--on slurm`: embeddings of shards, each made by whichever process of a pool is free."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from data.convert.on_ranks import map_out
from data.embeddings.embedded import EMBEDDINGS
from data.embeddings.folder import JOURNAL, LEDGER, EmbeddedShard, EmbeddingFolder, make_part
from data.pools.base import Pool
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Source, open_source
from eval.encoder import evaluation_mode
from launch.embed import EmbedConfig, ShardEmbedder, folder_of, print_embedded, require_known
from launch.model_source import load_model
from launch.shown_progress import shown_progress
from vlm.errors import EveryRankError, UserError
from vlm.model.dual_encoder import DualEncoder
from vlm.paths import output_folder
from vlm.progress import report_progress


@dataclass(frozen=True)
class EmbedPlan:
    """All that a process needs to know to embed any of the shards; fields as `embed_shards` has them."""

    model: str
    patterns: tuple[str, ...]
    config: EmbedConfig
    out: Path
    batch_size: int
    threads: int
    trust: bool = False


@dataclass(frozen=True)
class _Job:
    plan: EmbedPlan
    weights: str
    number: int
    state: str


def embed_on(pool: Pool, plan: EmbedPlan) -> Mapping[int, EmbeddedShard]:
    """Write the embeddings of the plan as `embed_shards` does, by the processes of a pool. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EveryRankError("--on: work that is shared by a cluster is started by one process, without a launcher")
    out = output_folder(plan.out, "--out", files=(JOURNAL, LEDGER, EMBEDDINGS.file)).absolute()
    plan = replace(plan, out=out)
    source, model = _opened(plan)
    require_known(source)
    folder = folder_of(source, out, model, plan.config)
    job = partial(_Job, plan, folder.model)
    with shown_progress():
        results = map_out(folder.work, job, _embed, folder.finish, pool, partial(report_progress, "shards"))
    print_embedded(folder, results)
    return results


def _opened(plan: EmbedPlan, device: torch.device | None = None) -> tuple[Source, DualEncoder]:
    index = FolderIndex(ShardCache(), "SHARDS")
    source = open_source("SHARDS", plan.patterns, index, images="image" in plan.config.what)
    return source, load_model(plan.model, device, trust=plan.trust)


def _embed(job: _Job) -> EmbeddedShard:
    """The work of one process. Raises UserError where the model is another one here."""
    folder, model = _prepared(job.plan)
    if folder.model != job.weights:
        raise UserError(f"{job.plan.model}: other weights on another machine: every one needs the same files")
    plan = job.plan
    with (
        evaluation_mode(model, precision=plan.config.precision) as encoder,
        ThreadPoolExecutor(plan.threads) as threads,
    ):
        embedder = ShardEmbedder(model, encoder, plan.config, ShardReader(ShardCache()), threads, plan.batch_size)
        return make_part(folder, embedder, job.number, job.state)


@lru_cache(maxsize=1)
def _prepared(plan: EmbedPlan) -> tuple[EmbeddingFolder, DualEncoder]:
    """The folder and the model, loaded once a process."""
    source, model = _opened(plan, torch.device("cuda") if torch.cuda.is_available() else None)
    return folder_of(source, plan.out, model, plan.config), model
