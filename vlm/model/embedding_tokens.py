"""Tokens for a decoder out of the embedding of an image, or of a text in its place (CLOSE: Gu et al., 2022)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.batch import BatchPart, StandIns
from vlm.model.captioner_config import CaptionerConfig, GapConfig
from vlm.model.gap_statistics import GapStatistics
from vlm.objectives.counter_rng import normals


class ModalityGap(nn.Module):
    """The way of texts' embeddings to where images are: see `GapConfig`. Its statistics are buffers of the model."""

    shift: Tensor
    root: Tensor

    def __init__(self, config: GapConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        if config.correction != "none":
            self.register_buffer("shift", torch.zeros(dim))
        if config.correction == "covariance":
            self.register_buffer("root", torch.zeros(dim, dim))

    @torch.no_grad()
    def fill(self, statistics: GapStatistics) -> None:
        """Take what the correction needs of the statistics of this model's pairs."""
        for name in ("shift", "root"):
            if hasattr(self, name):
                getattr(self, name).copy_(getattr(statistics, name))

    def forward(
        self, texts: Float[Tensor, "texts dim"], words: Int64[Tensor, " texts"] | None = None
    ) -> Float[Tensor, "texts dim"]:
        """Unit vectors as images' might be; `words` are what is drawn from in training, None: nothing is drawn."""
        config = self.config
        draws = words if self.training else None
        moved = texts if config.correction == "none" else texts + self.shift
        if draws is not None and config.correction == "covariance":
            moved = moved + config.spread * normals(draws, texts.shape[1], "difference").to(texts) @ self.root.T
        if draws is not None and config.noise:
            moved = moved + config.noise * normals(draws, texts.shape[1], "noise").to(texts)
        unit: Tensor = texts if moved is texts else normalize(moved, dim=1)
        return unit


class EmbeddingTokens(nn.Module):
    """A linear map of an embedding to the tokens that a decoder looks at."""

    def __init__(self, config: CaptionerConfig, dim: int, width: int) -> None:
        super().__init__()
        self._queries = config.queries
        self.gap = ModalityGap(config.gap or GapConfig(noise=0.0), dim)
        self.projection = nn.Linear(dim, config.queries * width)
        # An embedding is of unit norm: so the tokens' coordinates begin with variance 1, as behind a norm.
        nn.init.normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        *,
        of_texts: bool = False,
        words: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """The tokens of images' embeddings, or of texts' that go the way to images first."""
        if of_texts:
            with torch.autocast(embeddings.device.type, enabled=False):
                embeddings = self.gap(embeddings, words)
        tokens: Tensor = self.projection(embeddings).unflatten(1, (self._queries, -1))
        return tokens

    def in_place_of_images(
        self, embeddings: Float[Tensor, "texts dim"], stand_ins: BatchPart | None
    ) -> Float[Tensor, "texts queries width"]:
        """The tokens of texts that stand in for images; without `stand_ins` each text for its own.

        The texts' embeddings are constants here: they would learn to tell more of a text than images do.
        """
        texts, draws = embeddings.detach(), None
        if isinstance(stand_ins, StandIns):
            texts = texts[torch.arange(len(texts), device=texts.device) + stand_ins.offsets]
            draws = stand_ins.words
        return self(texts, of_texts=True, words=draws)  # type: ignore[no-any-return]
