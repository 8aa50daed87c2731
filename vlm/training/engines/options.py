"""The options of engines as a recipe says them: how ranks share, what travels between them, what leaves the GPU."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vlm.config import Config

Wire = Literal["fp32", "bf16"]
Layout = Literal["whole", "rows", "flat"]
"""How a rank holds a parameter and its moments: whole; its rows, as a `DTensor` that knows the whole; or its part of
many parameters one behind the other."""
ShardGroup = Literal["all", "node"] | Annotated[int, Field(gt=1, le=2**20)]


# How the shipped engines hold parameters, and which options they follow: here, so that a mistake is told without
# importing all of them.
LAYOUTS: Mapping[str, Layout] = {"ddp": "whole", "fsdp": "rows", "zero1": "flat", "zero2": "flat", "zero3": "flat"}
_ZERO = frozenset({"wire", "bucket_mib", "overlap", "offload.optimizer"})
TAKES: Mapping[str, frozenset[str]] = {
    "ddp": frozenset({"wire", "bucket_mib"}),
    "fsdp": frozenset({"wire", "prefetch", "shard_group", "offload.parameters"}),
    "zero1": _ZERO,
    "zero2": _ZERO,
    "zero3": _ZERO | {"offload.parameters"},
}


class OffloadConfig(Config):
    """What lies outside the GPU's memory between its uses: slower steps for larger models.

    `optimizer` moves moments and master weights, and updates them on the CPU; `parameters` moves a rank's shards of the
    weights. Engine fsdp keeps both in one place, so there `parameters` is both. DeepSpeed's `nvme` is refused: it reads
    gradients back at the wrong place where a rank's shard is of several parameters (0.19.8).
    """

    optimizer: Literal["cpu"] | None = Field(
        default=None, description="where the optimizer's state lies and is updated; null: on the GPU (zero1-3)"
    )
    parameters: Literal["cpu"] | None = Field(
        default=None, description="where the shards of weights lie; null: on the GPU (zero3, fsdp)"
    )

    @field_validator("optimizer", "parameters", mode="before")
    @classmethod
    def _not_on_a_drive(cls, place: Any) -> Any:
        if place == "nvme":
            raise ValueError("found 'nvme', through which DeepSpeed 0.19 changes gradients; choose cpu")
        return place


class EngineOptions(Config):
    """Options of the engine; each is for some engines, and refused by the others. None changes what is computed.

    `wire` alone rounds: gradients that travel in bf16 are half the traffic, and their sum over the ranks is rounded to
    8 bits at each addition. Gradients of micro-batches are added in fp32, by ddp and zero1 before they travel, by zero2
    and zero3 afterwards; fsdp adds them in the wire's precision.

    Communication beside computation: ddp and zero1-3 send gradients in buckets while the backward goes on
    (`bucket_mib`; a larger one is faster to send and later to begin), zero1-3 only with `overlap`, which takes a second
    bucket of memory; fsdp gathers the next block while one computes, one ahead in the backward, and as far as the CPU
    is ahead of the GPU in the forward, unless `prefetch` says how many.

    `shard_group` is hierarchical sharding (HSDP): weights are gathered within a group of consecutive ranks, on the fast
    links of a node, and only the shards of gradients travel between groups, each of which keeps a whole copy.
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
    shard_group: ShardGroup = Field(
        default="all",
        description="fsdp: ranks that share a whole copy of the weights: all, those of a node, or so many",
    )
    offload: OffloadConfig = Field(default=OffloadConfig(), description="what lies outside the GPU's memory")

    @field_validator("shard_group", mode="before")
    @classmethod
    def _of_several(cls, group: Any) -> Any:
        if isinstance(group, int) and group < 2:
            raise ValueError(f"found {group}; choose from: all, node, or 2 ranks and more (engine ddp shards nothing)")
        return group

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
