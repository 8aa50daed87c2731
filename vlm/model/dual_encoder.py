"""The dual encoder: an image tower, a text tower, and the scale between them."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from vlm.errors import EveryRankError
from vlm.model.config import ModelConfig
from vlm.model.heads import build_head
from vlm.model.image_spec import ImageSpec
from vlm.model.logit_scale import INITIAL_LOGIT_SCALE, limited_scale
from vlm.model.tokenizer import Tokenizer
from vlm.model.towers import ImageTower, TextTower


class DualEncoder(nn.Module):
    """Images and texts as unit vectors of one space (CLIP: Radford et al., 2021; SigLIP adds the bias).

    `config` and `files` rebuild this model without reading any weights. `logit_scale` is the logarithm of the scale.

    Raises UserError for heads that make embeddings of unequal width.
    """

    def __init__(self, config: ModelConfig, image: ImageTower, text: TextTower, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.text = text
        self.embed_dim = _embed_dim(config)
        self.image_head, self.text_head = (
            nn.Identity() if head is None else build_head(head, _tower_dim(config))
            for head in (config.image_head, config.text_head)
        )
        self.tokenizer = tokenizer
        # One element, not none: DeepSpeed and FSDP2 refuse 0-dim parameters.
        scale = INITIAL_LOGIT_SCALE if config.init_logit_scale is None else config.init_logit_scale
        start = torch.full((1,), math.log(scale), dtype=torch.float32)
        self.logit_scale = nn.Parameter(start, requires_grad=config.learn_logit_scale)
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias, dtype=torch.float32))
        # What an objective's terms learn beside the model: it trains, and is saved, with it.
        self.term_parameters = nn.ParameterDict()
        # Of transformers: configurations and tokenizer, with which a checkpoint is whole. And what a user should know.
        self.files: dict[str, bytes] = {}
        self.notices: tuple[str, ...] = ()

    @property
    def image_spec(self) -> ImageSpec:
        """What images must look like when they come here."""
        return self.image.spec

    @property
    def tower_dim(self) -> int:
        """The width of what the towers make, before any head."""
        return _tower_dim(self.config)

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        tokens: Int64[Tensor, "texts length"],
        lengths: Int64[Tensor, " texts"],
    ) -> tuple[Tensor | None, ...]:
        """Image [batch, dim] and text [texts, dim] embeddings, the limited scale, the bias or None, term parameters.

        A plain tuple, because the engines look for tensors in what a forward returns.
        """
        image, text = self.encode_image(images), self.encode_text(tokens, lengths)
        # A view, not the parameter itself: engines that shard parameters take theirs back after the forward.
        bias = None if self.logit_bias is None else self.logit_bias * 1
        own = [parameter * 1 for parameter in self.term_parameters.values()]
        return image, text, limited_scale(self.logit_scale), bias, *own

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit-norm embeddings in at least fp32, under autocast too."""
        return _unit_norm(self.image_head(self.image(images)))

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Unit-norm embeddings in at least fp32, under autocast too."""
        return _unit_norm(self.text_head(self.text(tokens, lengths)))

    def before_head(self) -> "BeforeHead":
        """The same model, read before its heads."""
        return BeforeHead(self)

    def drop_heads(self) -> None:
        """Take the heads off for good: embeddings are then what the towers make."""
        self.config = self.config.model_copy(update={"image_head": None, "text_head": None})
        self.image_head, self.text_head = nn.Identity(), nn.Identity()
        self.embed_dim = _embed_dim(self.config)


class BeforeHead:
    """A dual encoder whose embeddings are those before its heads, to be evaluated."""

    def __init__(self, model: DualEncoder) -> None:
        self._model = model

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tower_dim"]:
        """What the image tower makes, of unit norm."""
        return _unit_norm(self._model.image(images))

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch tower_dim"]:
        """What the text tower makes, of unit norm."""
        return _unit_norm(self._model.text(tokens, lengths))

    def modules(self) -> Iterator[nn.Module]:
        """The model and all modules in it."""
        return self._model.modules()

    def eval(self) -> nn.Module:
        """Switch to evaluation."""
        return self._model.eval()


def _tower_dim(config: ModelConfig) -> int:
    parts = config.architecture or config.towers
    assert parts is not None
    return parts.embed_dim


def _embed_dim(config: ModelConfig) -> int:
    """The width of an embedding of either modality."""
    tower_dim = _tower_dim(config)
    dims = {}
    for name, head in (("image_head", config.image_head), ("text_head", config.text_head)):
        try:
            dims[name] = tower_dim if head is None else head.embed_dim(tower_dim)
        except ValueError as error:
            raise EveryRankError(f"model.{name}: {error}") from None
    image, text = dims.values()
    if image != text:
        raise EveryRankError(f"model: image_head makes {image} dimensions, text_head {text}; they must be as many")
    return image


def _unit_norm(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    with torch.autocast(embeddings.device.type, enabled=False):
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return functional.normalize(precise, dim=-1)


def no_weight_decay_names(model: nn.Module) -> frozenset[str]:
    """The parameters to keep from weight decay: logit scale and bias, norms, biases, and all others of one dimension.

    Ask before an engine shards the parameters: they lose their shape then.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if is_norm or parameter.ndim < 2 or name.endswith("bias"):
                names.add(name)
    return frozenset(names)
