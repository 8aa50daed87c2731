"""Figures of GPUs, or of machines without one, by which plans are made: shipped ones, or those of a file."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from vlm.config import Config, first_problem
from vlm.errors import UserError, nearest, reason
from vlm.paths import local_path
from vlm.training.precision import Precision
from vlm.yaml_text import parse_yaml

TABLE = Path(__file__).parent / "gpus.yaml"
_MAX_BYTES = 2**16
GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


class Gpu(Config):
    """Figures of a kind of GPU and of what stands around one of them in a usual machine."""

    name: str = Field(default="own", description="as a plan calls it")
    kind: Literal["gpu", "cpu"] = Field(default="gpu", description="cpu: a rank computes on cores of its own")
    memory_gb: float = Field(gt=0, le=1e5, description="of 10^9 bytes")
    reserved_gb: float = Field(default=1.5, ge=0, le=1e4, description="of it for driver, libraries and fragments")
    bf16_tflops: float = Field(gt=0, le=1e6, description="peak of dense bf16 products")
    fp32_tflops: float = Field(gt=0, le=1e6, description="peak of fp32 products")
    matrix_share: float = Field(default=0.6, gt=0, le=1, description="share of the peak that large products reach")
    memory_gb_s: float = Field(gt=0, le=1e6, description="bandwidth of its memory")
    memory_share: float = Field(default=0.8, gt=0, le=1, description="share of that which plain operations reach")
    op_us: float = Field(default=6.0, ge=0, le=1e6, description="that each operation takes at least")
    link_gb_s: float = Field(gt=0, le=1e6, description="that each GPU sends to others of its node, one way")
    network_gb_s: float = Field(gt=0, le=1e6, description="that each GPU sends to other nodes, one way")
    link_share: float = Field(default=0.75, gt=0, le=1, description="share of a link that collectives reach")
    latency_us: float = Field(default=15.0, ge=0, le=1e7, description="of each hop of a collective")
    overlap: float = Field(default=0.8, ge=0, le=1, description="share of computing that communication may hide behind")
    cores: float = Field(gt=0, le=1024, description="of the CPU for each GPU of a node")
    decode_ms: float = Field(default=1.5, gt=0, le=1e6, description="of one core for a training sample")
    note: str | None = Field(default=None, description="what to know of these figures")

    @property
    def faster_precision(self) -> Precision:
        """The precision in which it multiplies faster, which `precision: auto` means there."""
        return "bf16" if self.bf16_tflops > self.fp32_tflops else "fp32"

    def product_rate(self, precision: Precision) -> float:
        """FLOPs a second of large products."""
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * TERA * self.matrix_share

    def peak_rate(self, precision: Precision) -> float:
        """FLOPs a second by the figures of the maker, of which MFU is a share."""
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * TERA

    @property
    def memory_rate(self) -> float:
        """Bytes a second of plain operations."""
        return self.memory_gb_s * GIGA * self.memory_share

    def wire_rate(self, nodes: int) -> float:
        """Bytes a second that a GPU sends in a collective over so many nodes."""
        return (self.link_gb_s if nodes == 1 else min(self.link_gb_s, self.network_gb_s)) * GIGA * self.link_share

    @property
    def room(self) -> float:
        """Bytes that a run may take."""
        return (self.memory_gb - self.reserved_gb) * GIGA


def gpu_named(name: str) -> Gpu:
    """The GPU of the shipped table called `name`, or that of a YAML file.

    Raises:
        UserError: there is none of that name, or the file is none or says what no GPU can be.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(local_path(name, "--gpu"))
    known = shipped_gpus()
    if name.lower() not in known:
        raise UserError(f"--gpu: there is no {name!r} in the table; {nearest(name.lower(), known)}, or a YAML file")
    return known[name.lower()]


def shipped_gpus() -> dict[str, Gpu]:
    """The table that ships, by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: Gpu.model_validate({"name": name, **figures}) for name, figures in table.items()}


def _read(path: Path) -> Gpu:
    try:
        text = path.read_bytes()[: _MAX_BYTES + 1]
    except OSError as error:
        raise UserError(f"--gpu: {path}: {error.strerror or reason(error)}") from None
    if len(text) > _MAX_BYTES:
        raise UserError(f"--gpu: {path}: larger than any table of figures")
    try:
        values = parse_yaml(text.decode("utf-8", "replace"))
        return Gpu.model_validate({"name": path.stem, **values} if isinstance(values, dict) else values)
    except yaml.YAMLError as error:
        raise UserError(f"--gpu: {path}: is no YAML ({reason(error)})") from None
    except ValidationError as error:
        raise UserError(f"--gpu: {path}: {first_problem(error, Gpu)}") from None
