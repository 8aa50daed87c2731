"""Statistics of what the images and texts of one model differ by, in a file that knows whose they are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vlm.errors import EveryRankError, reason
from vlm.model.identity import tensors_identity
from vlm.paths import write_output

_FORMAT = "vlm-gap-1"
_TENSORS = ("image_mean", "text_mean", "covariance")
_EMBEDDING = ("image.", "text.", "image_head.", "text_head.", "image_pooler.")


@dataclass(frozen=True)
class GapStatistics:
    """The means of pairs' images and texts, all of unit norm, and the covariance of the pairs' differences."""

    image_mean: Float[Tensor, " dim"]
    text_mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]

    @staticmethod
    def of(images: Float[Tensor, "pairs dim"], texts: Float[Tensor, "pairs dim"]) -> "GapStatistics":
        """Those of some pairs, in float64. Raises EveryRankError for embeddings that are no finite numbers."""
        images, texts = images.double(), texts.double()
        differences = images - texts
        centred = differences - differences.mean(0)
        made = GapStatistics(images.mean(0), texts.mean(0), centred.T @ centred / len(centred))
        if not made.are_finite:
            raise EveryRankError(f"the model's embeddings of {len(images)} pairs are no finite numbers")
        return made

    @property
    def are_finite(self) -> bool:
        """Whether all of them are finite numbers."""
        return all(bool(getattr(self, name).isfinite().all()) for name in _TENSORS)

    @property
    def shift(self) -> Float[Tensor, " dim"]:
        """From texts to images."""
        return self.image_mean - self.text_mean

    @property
    def root(self) -> Float[Tensor, "dim dim"]:
        """The symmetric matrix whose square is the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return root

    def write(self, path: Path, weights: str, where: str) -> None:
        """Write the file, whole or not at all; `weights` are the identity of the model's.

        Raises UserError, which begins with `where`, where it cannot be written.
        """
        tensors = {name: getattr(self, name).float().cpu().contiguous() for name in _TENSORS}
        metadata = {"format": _FORMAT, "weights": weights, "tensors": tensors_identity(tensors)}
        write_output(path, save(tensors, metadata), where)

    @staticmethod
    def read(path: Path, weights: str, dim: int, where: str) -> "GapStatistics":
        """The statistics in a file, which is to be of a model with these weights and embeddings so wide.

        Raises:
            EveryRankError: it begins with `where`; there is no such file, it is damaged, of another model, or of one
                whose embeddings are no finite numbers.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _TENSORS if name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EveryRankError(f"{where}: {path}: {reason(error)}; `vlm gap` writes it") from None
        if metadata.get("format") != _FORMAT or len(tensors) < len(_TENSORS):
            raise EveryRankError(f"{where}: {path} is no file of `vlm gap`")
        if metadata.get("tensors") != tensors_identity(tensors):
            raise EveryRankError(f"{where}: {path} is damaged (its checksum does not match)")
        if [list(tensor.shape) for tensor in tensors.values()] != [[dim], [dim], [dim, dim]]:
            found = tensors["image_mean"].shape[0]
            raise EveryRankError(f"{where}: {path} is of embeddings of {found} dimensions; the model's have {dim}")
        if metadata.get("weights") != weights:
            raise EveryRankError(f"{where}: {path} is of a model with other weights; `vlm gap` measures this one")
        found_statistics = GapStatistics(**tensors)
        if not found_statistics.are_finite:
            raise EveryRankError(f"{where}: {path} has values that are no finite numbers; `vlm gap` measures anew")
        return found_statistics


def weights_of(model: nn.Module) -> str:
    """The identity of the weights that make a dual encoder's embeddings: towers and heads, whatever stands beside."""
    return tensors_identity(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(_EMBEDDING) and tensor.is_floating_point()
        }
    )
