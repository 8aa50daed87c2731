"""The dual encoder: an image tower, a text tower, and the scale between them."""

import math

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from vlm.model.config import ModelConfig
from vlm.model.image_spec import ImageSpec
from vlm.model.logit_scale import INITIAL_LOGIT_SCALE, limited_scale
from vlm.model.tokenizer import Tokenizer
from vlm.model.towers import ImageTower, TextTower


class DualEncoder(nn.Module):
    """Images and texts as unit vectors of one space (CLIP: Radford et al., 2021; SigLIP adds the bias).

    `config` rebuilds this model without reading any weights. `logit_scale` is the logarithm of the scale.
    """

    def __init__(self, config: ModelConfig, image: ImageTower, text: TextTower, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.text = text
        self.tokenizer = tokenizer
        # One element, not none: DeepSpeed and FSDP2 refuse 0-dim parameters.
        scale = INITIAL_LOGIT_SCALE if config.init_logit_scale is None else config.init_logit_scale
        start = torch.full((1,), math.log(scale), dtype=torch.float32)
        self.logit_scale = nn.Parameter(start, requires_grad=config.learn_logit_scale)
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias, dtype=torch.float32))
        # What an objective's terms learn beside the model: it trains, and is saved, with it.
        self.term_parameters = nn.ParameterDict()

    @property
    def image_spec(self) -> ImageSpec:
        """What images must look like when they come here."""
        return self.image.spec

    @property
    def embed_dim(self) -> int:
        """The width of an embedding."""
        parts = self.config.architecture or self.config.towers
        assert parts is not None
        return parts.embed_dim

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
        return _unit_norm(self.image(images))

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Unit-norm embeddings in at least fp32, under autocast too."""
        return _unit_norm(self.text(tokens, lengths))


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
