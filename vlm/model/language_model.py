"""The last layers of a causal language model as a decoder that looks at images (Flamingo: Alayrac et al., 2022)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.errors import EveryRankError
from vlm.model.adapters import adapters_of, merge
from vlm.model.attention import Block, initialise_blocks
from vlm.model.captioner import Decoder, DecoderCache, Vocabulary, fitted
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.causal_models import begin, places_of, run_layer
from vlm.model.dual_encoder import DualEncoder
from vlm.model.language_model_config import LanguageModelConfig, LoraConfig
from vlm.model.language_model_tower import LanguageModelTower, UpperHalf


class TanhGate(nn.Module):
    """A learned share of what is added to the stream: none of it at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))  # one element, not none: engines refuse 0-dim parameters

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """x tanh(gate)."""
        return x * self.gate.tanh()


class LanguageModelDecoder(Decoder):
    """The upper half of a language model, with a gated block over the image's tokens before every so many layers."""

    def __init__(self, upper: UpperHalf, config: CaptionerConfig, image_width: int) -> None:
        super().__init__()
        assert config.language_model is not None
        width, num_words = upper.vocabulary.shape
        self._cross_every = config.language_model.cross_every
        self._adapters: list[nn.Module] = []
        self._is_locked = False
        self.image_projection = fitted(image_width, width)
        self.layers = nn.ModuleList(upper.layers)
        self.cross_attn = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, is_cross=True, gate=TanhGate)
            for _ in range(0, len(self.layers), self._cross_every)
        )
        self.rotary = upper.rotary
        self.norm = upper.norm
        self.vocabulary = Vocabulary(width, num_words)
        self.vocabulary.weight.data.copy_(upper.vocabulary)
        initialise_blocks(self.cross_attn, width, len(self.cross_attn))

    def blocks(self) -> Sequence[nn.Module]:  # noqa: D102
        pairs = [(self._cross_before(number), layer) for number, layer in enumerate(self.layers)]
        return [block for pair in pairs for block in pair if block is not None]

    def last_states(  # noqa: D102
        self,
        states: Float[Tensor, "texts length state_width"],
        memory: Float[Tensor, "images tokens width"] | None,
        mask: Bool[Tensor, "texts length tokens"] | None,
        cache: DecoderCache | None,
    ) -> Float[Tensor, "texts length width"]:
        start = begin(None if cache is None else cache.tokens, len(self.layers))
        places = places_of(states, start, self.rotary)
        for number, layer in enumerate(self.layers):
            cross = self._cross_before(number)
            if cross is not None:
                known = None if cache is None else cache.image[number // self._cross_every]
                states = cross(states, memory, mask=mask, cache=known)
            states = run_layer(layer, states, places, None if cache is None else cache.tokens[number])
        return self.norm(states)  # type: ignore[no-any-return]

    def lock(self, adapters: list[nn.Module]) -> None:
        """Keep the language model's own weights as they are, for good, but for these adapters of its layers."""
        self._is_locked = True
        self._adapters = adapters
        learned = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
        for part in (self.layers, self.norm, self.vocabulary):
            for parameter in part.parameters():
                parameter.requires_grad_(id(parameter) in learned)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LanguageModelDecoder":
        """Training or evaluation mode; what is locked stays in evaluation mode."""
        super().train(mode)
        if self._is_locked:
            for part in (self.layers, self.norm, self.vocabulary):
                part.eval()
            for adapter in self._adapters:
                adapter.train(mode)
        return self

    def _cross_before(self, number: int) -> nn.Module | None:
        return None if number % self._cross_every else self.cross_attn[number // self._cross_every]


def split_decoder(model: DualEncoder, config: CaptionerConfig, image_width: int) -> LanguageModelDecoder:
    """The decoder that the model's text tower was cut off. Raises EveryRankError for a tower of another kind."""
    upper = model.text.take_upper() if isinstance(model.text, LanguageModelTower) else None
    if upper is None:
        raise EveryRankError(
            "model.captioner.language_model: the text tower is none; it is for towers.text: {transformers: PATH} of a "
            "causal language model"
        )
    return LanguageModelDecoder(upper, config, image_width)


def restrict_training(model: DualEncoder, config: LanguageModelConfig) -> None:
    """Lock both halves of a language model, or adapt them, as `config` says.

    Raises EveryRankError where `model.lock` says it too, and for adapters of maps that the layers do not have.
    """
    text, decoder = model.text, model.decoder
    assert isinstance(text, LanguageModelTower)
    assert isinstance(decoder, LanguageModelDecoder)
    if config.train == "all":
        return
    if model.config.lock.text is not None:
        raise EveryRankError(
            f"model.lock.text: model.captioner.language_model.train ({config.train}) locks the text tower already"
        )
    adapters: list[nn.Module] = []
    if config.train == "lora":
        targets = config.lora.targets or text.causal.family.adapted
        text.add_adapters(adapters_of(text.causal.layers, config.lora, targets))
        adapters = adapters_of(list(decoder.layers), config.lora, targets)
    text.lock()
    decoder.lock(adapters)


@torch.no_grad()
def merge_adapters(model: DualEncoder) -> None:
    """Add the adapters of a split language model to its own weights, for good: the same model, without adapters."""
    text, decoder, captioner = model.text, model.decoder, model.config.captioner
    assert isinstance(captioner, CaptionerConfig)
    if captioner.language_model is None or captioner.language_model.train != "lora":
        return
    assert isinstance(text, LanguageModelTower)
    assert isinstance(decoder, LanguageModelDecoder)
    merge(text.model)
    merge(decoder.layers)
    text.drop_adapters()
    decoder.lock([])
    split = captioner.language_model.model_copy(update={"train": "none", "lora": LoraConfig()})
    captioner = captioner.model_copy(update={"language_model": split})
    model.config = model.config.model_copy(update={"captioner": captioner})
