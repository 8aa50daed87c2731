"""The dual encoder: an image tower, a text tower, and the scale between them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from vlm.activity import phase
from vlm.batch import DOCUMENT_IMAGES, DOCUMENTS, BatchPart, Documents, Images, Texts
from vlm.errors import UserError
from vlm.model.captioner import Decoder, ImagePooler
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.config import ModelConfig
from vlm.model.document_memory import document_likelihood
from vlm.model.embedding_tokens import EmbeddingTokens
from vlm.model.heads import build_head
from vlm.model.image_spec import ImageSpec
from vlm.model.logit_scale import INITIAL_LOGIT_SCALE, limited_scale
from vlm.model.tokenizer import Tokenizer
from vlm.model.towers import ImageTower, TextTower, TowerOutput
from vlm.outputs import captioned_parts, is_shared, likelihood_of, output_name, stand_ins_of

_NO_DECODER = "the model has no captioning decoder (model.captioner)"


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
        self.embed_dim = config.embed_dim
        self.image_head, self.text_head = (
            nn.Identity() if head is None else build_head(head, config.tower_dim)
            for head in (config.image_head, config.text_head)
        )
        self.tokenizer = tokenizer
        # Once a captioner is attached: the decoder, and the pooler that makes the embedding of an image's tokens, or
        # the map that makes tokens of the embedding.
        self.image_pooler: ImagePooler | None = None
        self.embedding_tokens: EmbeddingTokens | None = None
        self.decoder: Decoder | None = None
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
        """The form of the images that come here."""
        return self.image.spec

    @property
    def tower_dim(self) -> int:
        """The width of what the towers make, before any head."""
        return self.config.tower_dim

    def forward(
        self,
        inputs: Mapping[str, BatchPart],
        outputs: frozenset[str],
    ) -> dict[str, Tensor]:
        """The named outputs of a batch's parts (`vlm.outputs`): embeddings of unit norm, and what all rows share.

        An output whose part is not there is left out. All images go through one call of their tower, and all texts but
        documents, which are longer, through one of theirs.
        """
        # Views, not the parameters themselves: engines that shard parameters take theirs back after the forward.
        made = {"logit_scale": limited_scale(self.logit_scale)}
        if self.logit_bias is not None:
            made["logit_bias"] = self.logit_bias * 1
        made |= {output_name(key): parameter * 1 for key, parameter in self.term_parameters.items()}
        captioned = [part for part in captioned_parts(outputs) if part in inputs and part != DOCUMENTS]
        captioned_from_text = [part for part in captioned_parts(outputs, "text") if part in inputs]
        documents = inputs.get(DOCUMENTS) if likelihood_of(DOCUMENTS) in outputs else None
        looked_at = [*(["image"] if captioned else []), *([] if documents is None else ["image", DOCUMENT_IMAGES])]
        images = {
            name: part for name, part in inputs.items() if name in {*outputs, *looked_at} and isinstance(part, Images)
        }
        image_embeddings, image_tokens = self._encode_images(images)
        made |= image_embeddings
        texts = {
            name: part
            for name, part in inputs.items()
            if name in {*outputs, *captioned, *captioned_from_text} and isinstance(part, Texts)
        }
        embeddings, states = self._encode_texts(texts)
        made |= embeddings
        for part in captioned:
            assert self.decoder is not None
            with phase("decoder"):
                looked_at_tokens = image_tokens["image"]
                made[likelihood_of(part)] = self.decoder.text_likelihood(texts[part], states[part], looked_at_tokens)
        for part in captioned_from_text:
            assert self.decoder is not None
            assert self.embedding_tokens is not None
            shown = self.embedding_tokens.in_place_of_images(embeddings[part], inputs.get(stand_ins_of(part)))
            own = replace(texts[part], owners=None)
            with phase("decoder"):
                made[likelihood_of(part, "text")] = self.decoder.text_likelihood(own, states[part], shown)
        if isinstance(documents, Documents):
            in_documents = image_tokens[DOCUMENT_IMAGES]
            with phase("decoder"):
                made[likelihood_of(DOCUMENTS)] = document_likelihood(self, documents, in_documents, inputs["text"])
        return {name: value for name, value in made.items() if is_shared(name) or name in outputs}

    def _encode_texts(self, texts: Mapping[str, Texts]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embeddings of several sets of texts, and their token states where a captioner is attached.

        The first caption of a sample is its `text`, embedded once.
        """
        several = texts.get("captions")
        sets = {name: part for name, part in texts.items() if name != "text" or several is None}
        if not sets:
            return {}, {}
        together = Texts.cat([replace(part, owners=None) for part in sets.values()], [0] * len(sets))
        embedding, tokens = self._encode_text(together.tokens, together.lengths)
        sizes = [len(part.lengths) for part in sets.values()]
        embeddings = dict(zip(sets, embedding.split(sizes), strict=True))
        states = {} if tokens is None else dict(zip(sets, tokens.split(sizes), strict=True))
        if several is not None and several.owners is not None and "text" in texts:
            samples = torch.arange(len(texts["text"].lengths), device=several.owners.device)
            first = torch.searchsorted(several.owners, samples)
            for made in (embeddings, states):
                made |= {"text": made["captions"][first]} if made else {}
        return embeddings, states

    def _encode_images(self, images: Mapping[str, Images]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embeddings of several sets of images by one forward, and their tokens where a decoder looks at them."""
        if not images:
            return {}, {}
        pixels = [part.pixels for part in images.values()]
        share = next(iter(images.values())).patch_dropout
        embedding, tokens = self._encode_image(pixels[0] if len(pixels) == 1 else torch.cat(pixels), share)
        sizes = [len(part) for part in pixels]
        embeddings = dict(zip(images, embedding.split(sizes), strict=True))
        return embeddings, {} if tokens is None else dict(zip(images, tokens.split(sizes), strict=True))

    def _encode_image(self, images: Tensor, patch_dropout: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings, and the tokens that a decoder looks at."""
        features, tokens = self.image_features(images, patch_dropout)
        embedding = _unit_norm(self.image_head(features))
        return embedding, tokens if self.embedding_tokens is None else self.embedding_tokens(embedding)

    def _encode_text(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        features, states = self.text_features(tokens, lengths)
        return _unit_norm(self.text_head(features)), states

    def image_features(self, images: Tensor, patch_dropout: float | None = None) -> tuple[Tensor, Tensor | None]:
        """What stands before the head: the tower's output, or the pooler's, and the tokens that a decoder looks at."""
        made = self.image(images, patch_dropout)
        features, tokens = made if isinstance(made, TowerOutput) else (made, None)
        return (features, tokens) if self.image_pooler is None else self.image_pooler(tokens)

    def text_features(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """The text tower's output, and the states of all tokens where a captioner is attached."""
        length = tokens.shape[1]
        made = self.text(self.text.in_steps(tokens) if self.training else tokens, lengths)
        return (made.embedding, made.tokens[:, :length]) if isinstance(made, TowerOutput) else (made, None)

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit-norm embeddings in at least fp32, under autocast too."""
        return self._encode_image(images)[0]

    def encode_image_and_tokens(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens token_width"]]:
        """The same, and the tokens that the captioning decoder looks at. Raises UserError for a model without one."""
        embedding, tokens = self._encode_image(images)
        if self.decoder is None or tokens is None:
            raise UserError(_NO_DECODER)
        return embedding, tokens

    def caption_likelihood(
        self,
        image_tokens: Float[Tensor, "batch image_tokens token_width"],
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """The log-likelihood of one text for each image: of all its tokens but the first."""
        return self.likelihood_of_states(image_tokens, self.encode_text_and_states(tokens, lengths)[1], tokens, lengths)

    def encode_text_and_states(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length state_width"]]:
        """Unit-norm embeddings, and the states of all tokens. Raises UserError for a model without decoder."""
        embedding, states = self._encode_text(tokens, lengths)
        if states is None:
            raise UserError(_NO_DECODER)
        return embedding, states

    def likelihood_of_states(
        self,
        image_tokens: Float[Tensor, "images image_tokens token_width"],
        states: Float[Tensor, "batch length state_width"],
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """The same of texts whose states are known, which come image by image, as many for each."""
        assert self.decoder is not None
        likelihood = self.decoder.text_likelihood(Texts(tokens, lengths), states, image_tokens)[:, 0]
        rows = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), lengths - 1)
        return likelihood.new_zeros(len(tokens)).index_add(0, rows, likelihood)

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Unit-norm embeddings in at least fp32, under autocast too."""
        return self._encode_text(tokens, lengths)[0]

    def before_head(self) -> "BeforeHead":
        """The same model, read before its heads."""
        return BeforeHead(self)

    def drop_heads(self) -> None:
        """Take the heads off for good: embeddings are then what the towers make.

        Raises UserError for a captioning decoder that looks at what the heads make.
        """
        if self.embedding_tokens is not None and (self.config.image_head or self.config.text_head):
            raise UserError("the captioning decoder (pooler embedding) looks at the embedding behind the heads")
        self.config = self.config.model_copy(update={"image_head": None, "text_head": None})
        self.image_head, self.text_head = nn.Identity(), nn.Identity()
        self.embed_dim = self.config.embed_dim

    def drop_decoder(self) -> None:
        """Take the captioning decoder off for good.

        Raises UserError where its pooler makes the embedding of images, or it is a part of the text tower's model.
        """
        captioner = self.config.captioner
        if isinstance(captioner, CaptionerConfig) and captioner.language_model is not None:
            raise UserError("the decoder and the text tower are one language model (captioner.language_model)")
        if self.image_pooler is not None:
            assert isinstance(captioner, CaptionerConfig)
            raise UserError(
                f"the captioner's pooler ({captioner.pooler}) makes the embedding of images; without the "
                "decoder there is none"
            )
        self.decoder = self.embedding_tokens = None
        self.config = self.config.model_copy(update={"captioner": "none"})


class BeforeHead:
    """A dual encoder whose embeddings are those before its heads, to be evaluated."""

    def __init__(self, model: DualEncoder) -> None:
        self._model = model

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tower_dim"]:
        """Outputs of the image tower, of unit norm."""
        return _unit_norm(self._model.image_features(images)[0])

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch tower_dim"]:
        """Outputs of the text tower, of unit norm."""
        return _unit_norm(self._model.text_features(tokens, lengths)[0])

    def modules(self) -> Iterator[nn.Module]:
        """The model and all modules in it."""
        return self._model.modules()

    def eval(self) -> nn.Module:
        """Switch to evaluation."""
        return self._model.eval()


def _unit_norm(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    with torch.autocast(embeddings.device.type, enabled=False):
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return functional.normalize(precise, dim=-1)
