"""transformers' vision and text models as towers, and the two halves of its CLIP and SigLIP."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from vlm.errors import UserError
from vlm.model.clean_configuration import quiet, refusing
from vlm.model.config import ImageTowerConfig, TextTowerConfig
from vlm.model.foreign import ForeignFiles, require_readable_weights
from vlm.model.towers import TextTower

# Text models whose attention mask and positions make padding exactly invisible. Others get the full context length.
_EXACTLY_MASKED = frozenset({"bert", "clip_text_model", "distilbert", "gpt2", "roberta", "xlm-roberta"})
# Text models that were trained without a mask, on texts padded to the full context length.
_NEVER_MASKED = frozenset({"siglip_text_model"})


class TransformersImageTrunk(nn.Module):
    """A vision model, pooled and projected: by `projection`, or where that is None by a new one to `embed_dim`."""

    def __init__(
        self, model: nn.Module, pool: str, image_size: int, embed_dim: int, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._pool = pool
        pooled = _trainable_where_used(model, lambda: self._pooled(torch.zeros(1, 3, image_size, image_size)))
        self.projection = _projection(pooled, embed_dim) if projection is None else projection

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
    """A text model, pooled and projected; its attention mask, if it knows one, is made of the texts' lengths."""

    def __init__(
        self,
        model: Any,
        pool: str,
        context_length: int,
        pad_id: int,
        embed_dim: int,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__(context_length, pad_id)
        self.model = model
        self._pool = pool
        tokens = torch.zeros(1, context_length, dtype=torch.long)
        lengths = torch.full((1,), context_length)
        pooled = _trainable_where_used(model, lambda: self._pooled(tokens, lengths))
        self.projection = _projection(pooled, embed_dim) if projection is None else projection

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
        seen = None if self.model.config.model_type in _NEVER_MASKED else mask.long()
        output = self.model(input_ids=tokens, attention_mask=seen)
        if self._pool == "pooler":
            return _pooler_output(output)
        hidden: Tensor = output.last_hidden_state
        if self._pool == "first":
            return hidden[:, 0]
        if self._pool == "end":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]


class TransformersModels:
    """The transformers models that the towers of one dual encoder are made of; one that serves both is loaded once."""

    def __init__(self, files: ForeignFiles) -> None:
        self._files = files
        self._whole: dict[tuple[str, bool], Any] = {}

    def image_trunk(self, config: ImageTowerConfig, embed_dim: int, image_size: int) -> nn.Module:
        """The vision model that `config` names. Raises UserError when it cannot be loaded or does not fit."""
        assert config.transformers is not None
        with refusing("towers.image.transformers", config.transformers):
            configuration = self._files.configuration("image", config.transformers)
            part = getattr(configuration, "vision_config", configuration)
            if hasattr(part, "image_size"):
                part.image_size = image_size
            model, missing = self._load(config.transformers, configuration, pretrained=config.pretrained)
            vision = getattr(model, "vision_model", model)
            if config.pool == "own":
                projection = getattr(model, "visual_projection", nn.Identity())
                trunk = TransformersImageTrunk(vision, "pooler", image_size, embed_dim, projection)
            else:
                trunk = TransformersImageTrunk(vision, config.pool or "pooler", image_size, embed_dim)
            require_weights(trunk, missing)
            return trunk

    def text_tower(self, config: TextTowerConfig, embed_dim: int, pad_id: int) -> TextTower:
        """The text model that `config` names. Raises UserError when it cannot be loaded or does not fit."""
        assert config.transformers is not None
        assert config.context_length is not None
        with refusing("towers.text.transformers", config.transformers):
            configuration = self._files.configuration("text", config.transformers)
            model, missing = self._load(config.transformers, configuration, pretrained=config.pretrained)
            if getattr(configuration, "is_encoder_decoder", False):
                model = model.get_encoder()
            text = getattr(model, "text_model", model)
            place = (config.context_length, pad_id, embed_dim)
            if config.pool == "own":
                tower = TransformersTextTower(text, "pooler", *place, getattr(model, "text_projection", nn.Identity()))
            else:
                tower = TransformersTextTower(text, config.pool or "mean", *place)
            require_weights(tower, missing)
            return tower

    def scale_and_bias(self) -> dict[str, Tensor]:
        """The learned logit scale and bias of the one pretrained model that both towers are halves of."""
        ((model, _),) = self._whole.values()
        found = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
        return {name: value.detach().reshape(1) for name, value in found.items() if value is not None}

    def _load(self, name: str, configuration: PreTrainedConfig, *, pretrained: bool) -> tuple[Any, set[int]]:
        """The model, and the identities of its parameters of which its files hold nothing."""
        if not hasattr(configuration, "text_config"):
            return load(name, configuration, pretrained=pretrained)
        key = (name, pretrained)
        if key not in self._whole:
            self._whole[key] = load(name, configuration, pretrained=pretrained)
        return self._whole[key]  # type: ignore[no-any-return]


def load(
    name: str, configuration: PreTrainedConfig, *, pretrained: bool, cls: Any = AutoModel, **options: Any
) -> tuple[Any, set[int]]:
    """A model of the library in fp32, and the identities of those parameters of which its files hold nothing."""
    with quiet():
        if not pretrained:
            return cls.from_config(configuration, trust_remote_code=False, **options), set()
        require_readable_weights(name)
        model, told = cls.from_pretrained(
            name,
            config=configuration,
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **options,
        )
    for key, found, needed in sorted(told["mismatched_keys"]):
        raise UserError(f"{key} is {list(found)} in its files but {list(needed)} in the model (another image_size?)")
    missing = set(told["missing_keys"])
    return model, {id(parameter) for key, parameter in model.named_parameters() if key in missing}


def require_weights(tower: nn.Module, missing: set[int]) -> None:
    """Raise UserError for a trained parameter of which the files hold nothing: it would be random, silently."""
    for name, parameter in tower.named_parameters():
        if id(parameter) in missing and parameter.requires_grad:
            raise UserError(f"its files hold no weights for {name.removeprefix('model.')}")


def _pooler_output(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError("pool: the model has no pooler; choose another pool")
    return pooled  # type: ignore[no-any-return]


@torch.enable_grad()
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
