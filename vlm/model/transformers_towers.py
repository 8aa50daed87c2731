"""transformers' vision and text models as towers, from a local folder or by hub name."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ImageProcessingMixin

from vlm.errors import UserError, reason
from vlm.model.config import ImageTowerConfig, TextTowerConfig
from vlm.model.image_spec import ImageSpec
from vlm.model.towers import TextTower

# Text models whose attention mask and positions make padding exactly invisible. Others get the full context length.
_EXACTLY_MASKED = frozenset({"bert", "distilbert", "gpt2", "roberta", "xlm-roberta"})
_LOAD_ERRORS = (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_PILLOW_BILINEAR = 2


class TransformersImageTrunk(nn.Module):
    """A vision model, pooled and projected."""

    def __init__(self, model: nn.Module, config: ImageTowerConfig, embed_dim: int, image_size: int) -> None:
        super().__init__()
        self.model = model
        self._pool = config.pool
        pooled = _trainable_where_used(model, lambda: self._pooled(torch.zeros(1, 3, image_size, image_size)))
        self.projection = _projection(pooled, embed_dim)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of normalised pixels."""
        return self.projection(self._pooled(pixels))  # type: ignore[no-any-return]

    def _pooled(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch width"]:
        output = self.model(pixel_values=pixels)
        if self._pool == "pooler":
            return _pooler_output(output).flatten(1)
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # convolutional: [batch, width, rows, columns]
            hidden = hidden.flatten(2).transpose(1, 2)
        return hidden[:, 0] if self._pool == "first" else hidden.mean(1)


class TransformersTextTower(TextTower):
    """A text model with an attention mask made of the texts' lengths, pooled and projected."""

    def __init__(self, model: Any, config: TextTowerConfig, embed_dim: int, pad_id: int) -> None:
        super().__init__(config.context_length, pad_id)
        self.model = model
        self._pool = config.pool
        tokens = torch.zeros(1, config.context_length, dtype=torch.long)
        lengths = torch.full((1,), config.context_length)
        pooled = _trainable_where_used(model, lambda: self._pooled(tokens, lengths))
        self.projection = _projection(pooled, embed_dim)

    @property
    def may_shorten(self) -> bool:
        """Whether this kind of model is known to ignore padding exactly."""
        return self.model.config.model_type in _EXACTLY_MASKED

    def forward(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings of texts, padded back to the context length where the model needs it."""
        length = tokens.shape[1] if self.may_shorten else self.context_length
        return self.projection(self._pooled(self.padded(tokens, lengths, length), lengths))  # type: ignore[no-any-return]

    def _pooled(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        output = self.model(input_ids=tokens, attention_mask=mask.long())
        if self._pool == "pooler":
            return _pooler_output(output)
        hidden: Tensor = output.last_hidden_state
        if self._pool == "first":
            return hidden[:, 0]
        if self._pool == "end":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]


def build_image_trunk(config: ImageTowerConfig, embed_dim: int, image_size: int) -> nn.Module:
    """The vision model that `config` names. Raises UserError when it cannot be loaded or does not fit."""
    assert config.transformers is not None
    try:
        configuration = AutoConfig.from_pretrained(config.transformers)
        part = getattr(configuration, "vision_config", configuration)
        if hasattr(part, "image_size"):
            part.image_size = image_size
        model = _model(config.transformers, configuration, pretrained=config.pretrained)
        return TransformersImageTrunk(getattr(model, "vision_model", model), config, embed_dim, image_size)
    except _LOAD_ERRORS as error:
        _refuse("image", config.transformers, error)


def build_text_tower(config: TextTowerConfig, embed_dim: int, pad_id: int) -> TextTower:
    """The text model that `config` names. Raises UserError when it cannot be loaded or does not fit."""
    assert config.transformers is not None
    try:
        configuration = AutoConfig.from_pretrained(config.transformers)
        model = _model(config.transformers, configuration, pretrained=config.pretrained)
        if getattr(configuration, "is_encoder_decoder", False):
            model = model.get_encoder()
        return TransformersTextTower(getattr(model, "text_model", model), config, embed_dim, pad_id)
    except _LOAD_ERRORS as error:
        _refuse("text", config.transformers, error)


def image_preprocessing(name: str) -> ImageSpec:
    """The images that the vision model `name` was made for, as far as its files say so."""
    try:
        configuration = AutoConfig.from_pretrained(name)
    except _LOAD_ERRORS as error:
        _refuse("image", name, error)
    size = getattr(getattr(configuration, "vision_config", configuration), "image_size", None)
    fields: dict[str, Any] = {} if size is None else {"size": size}
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # saved without an image processor
        return ImageSpec(**fields)
    fields |= {key: processor[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in processor}
    if processor.get("resample") == _PILLOW_BILINEAR:
        fields["interpolation"] = "bilinear"
    return ImageSpec.model_validate(fields)


def _model(name: str, configuration: Any, *, pretrained: bool) -> Any:
    if pretrained:
        return AutoModel.from_pretrained(name, config=configuration, weights_only=True)
    return AutoModel.from_config(configuration)


def _pooler_output(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError("pool: the model has no pooler; choose another pool")
    return pooled  # type: ignore[no-any-return]


def _trainable_where_used(model: nn.Module, pooled: Callable[[], Tensor]) -> Tensor:
    """One pooled output of `model`, whose parameters without influence on it are frozen.

    An engine that averages gradients would wait for theirs in vain.
    """
    was_training = model.training
    model.eval()
    output = pooled()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(output.sum(), parameters, allow_unused=True), strict=True
    ):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)
    return output.detach()


def _projection(pooled: Float[Tensor, "1 width"], embed_dim: int) -> nn.Linear:
    projection = nn.Linear(pooled.shape[1], embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=pooled.shape[1] ** -0.5)
    return projection


def _refuse(tower: str, name: str, error: Exception) -> NoReturn:
    raise UserError(f"towers.{tower}.transformers {name}: {reason(error)}") from error
