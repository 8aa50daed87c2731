"""The options of engines as a recipe says them: how ranks share, what travels between them, what leaves the GPU."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.paths import LocalPath

Wire = Literal["fp32", "bf16"]
Place = Literal["cpu", "nvme"]


class OffloadConfig(Config):
    """What lies outside the GPU's memory between its uses: slower steps for larger models.

    `optimizer` moves moments and master weights, and updates them on the CPU; `parameters` moves a rank's shards of the
    weights too. Engine fsdp keeps them in one place, so there `parameters: cpu` is both. `nvme` is DeepSpeed's, under
    zero3 alone.
    """

    optimizer: Place | None = Field(default=None, description="of the optimizer's state; null: on the GPU (zero1-3)")
    parameters: Place | None = Field(default=None, description="of the weights; null: on the GPU (zero3, fsdp)")
    folder: LocalPath | None = Field(
        default=None, description="nvme: a folder on a local drive of each node, for files that end with the run"
    )

    @model_validator(mode="after")
    def _has_folder_for_files(self) -> "OffloadConfig":
        if self.uses("nvme") != (self.folder is not None):
            raise ValueError("folder: it is needed for nvme, and means nothing without")
        return self

    def uses(self, place: Place) -> bool:
        """Whether something lies in this place."""
        return place in (self.optimizer, self.parameters)


class EngineOptions(Config):
    """Options of the engine; each is for some engines, and refused by the others. None changes what is computed.

    `wire` alone rounds: gradients that travel in bf16 are half the traffic, and their sum over the ranks is rounded to
    8 bits at each addition. Gradients of micro-batches are added in fp32 before they travel, but under fsdp, which adds
    them in the wire's precision.

    Communication beside computation: ddp and zero1-3 send gradients in buckets while the backward goes on
    (`bucket_mib`; a larger one is faster to send and later to begin), zero1-3 only with `overlap`, which takes a second
    bucket of memory; fsdp gathers the next block while one computes, one ahead in the backward, and as far as the CPU
    is ahead of the GPU in the forward, unless `prefetch` says how many.
    """

    wire: Wire = Field(default="fp32", description="precision of gradients between ranks")
    bucket_mib: int | None = Field(
        default=None, gt=0, le=2**14, description="of gradients that are sent together; null: 25 (ddp), 200 (zero1-3)"
    )
    overlap: bool | None = Field(
        default=None, description="zero1-3: send gradients while the backward goes on; null: true"
    )
    prefetch: int | None = Field(
        default=None,
        gt=0,
        le=64,
        description="fsdp: blocks that are gathered ahead of the one that computes; null: by torch",
    )
    shard_group: Literal["all", "node"] | Annotated[int, Field(gt=0, le=2**20)] = Field(
        default="all",
        description="fsdp: ranks that share a whole copy of the weights: all, those of a node, or so many",
    )
    offload: OffloadConfig = Field(default=OffloadConfig(), description="what lies outside the GPU's memory")

    def chosen(self) -> Mapping[str, Any]:
        """The options that are not as by default, by the path of their keys."""
        plain: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, OffloadConfig):
                plain |= {f"{name}.{key}": place for key, place in value if place is not None}
            elif value != field.default:
                plain[name] = value
        return plain
