"""The tokens of an image, of any trunk: what its embedding was pooled from."""

from collections.abc import Callable
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

# Normalised pixels [batch, 3, size, size] to an embedding [batch, dim] and tokens [batch, tokens, width].
TokenReader = Callable[[Tensor], tuple[Tensor, Tensor]]


def token_reader(trunk: nn.Module, feature_map: int | None = None) -> TokenReader:
    """The forward of a trunk that tells its tokens too.

    open_clip's ViTs, transformers' models and networks of one's own have an attribute `output_tokens`, which is set;
    timm's models and ResNets are listened to where they pool. `feature_map` is one of a timm model's own list.

    Raises:
        ValueError: nobody knows where this trunk has its tokens, or it has no such feature map.
    """
    if isinstance(trunk, TimmModel) and feature_map is not None:
        maps = list(getattr(trunk.trunk, "feature_info", ()))
        if not -len(maps) <= feature_map < len(maps):
            raise ValueError(f"there is no feature map {feature_map}: the trunk lists {len(maps)}")
        chosen = maps[feature_map]
        module = trunk.trunk.get_submodule(chosen["module"])
        return _Listener(trunk, module, "forward", channels=chosen["num_chs"])
    if feature_map is not None:
        raise ValueError(f"feature_map: a {type(trunk).__name__} lists no feature maps, as timm's models do")
    if isinstance(trunk, TimmModel):
        return _Listener(trunk, trunk.trunk, "forward_features", channels=trunk.trunk.num_features)
    if isinstance(trunk, ModifiedResNet):
        return _Listener(trunk, trunk.layer4, "forward", channels=trunk.output_dim)
    if hasattr(trunk, "output_tokens"):
        setattr(trunk, "output_tokens", True)  # noqa: B010 - torch knows tensors and modules alone as attributes
        return trunk.__call__  # the bound method: a module would become a part of whoever keeps it
    raise ValueError(f"nobody knows where a {type(trunk).__name__} has its tokens (it has no `output_tokens`)")


class _Listener:
    """Calls a trunk, and keeps what one method of one of its parts made on the way."""

    def __init__(self, trunk: nn.Module, part: Any, method: str, channels: int) -> None:
        self._trunk = trunk
        self._channels = channels
        self._features: list[Tensor] = []
        original = getattr(part, method)

        def listen(*arguments: Any, **options: Any) -> Any:
            features = original(*arguments, **options)
            self._features.append(features)
            return features

        setattr(part, method, listen)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self._features.clear()
        embedding = self._trunk(pixels)
        features = self._features.pop()
        if features.ndim == 4:  # a map of channels, or channels last
            is_last = features.shape[3] == self._channels and features.shape[1] != self._channels
            features = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
        return embedding, features
