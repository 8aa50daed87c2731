"""Factors of the learning rate by tower, and by the depth of a tower's layers."""

from pydantic import Field

from vlm.config import Config


class LrScale(Config):
    """Factors of the learning rate for the parameters of each tower; heads, scale, bias and terms have factor 1."""

    image: float = Field(default=1.0, gt=0, le=1000, description="of the image tower")
    text: float = Field(default=1.0, gt=0, le=1000, description="of the text tower")

    def of(self, name: str) -> float:
        """The factor of the parameter called `name` in the model."""
        return {"image": self.image, "text": self.text}.get(name.partition(".")[0], 1.0)


class LrDecay(Config):
    """Layer-wise decay of the learning rate (Clark et al., 2020, as in BEiT: Bao et al., 2022).

    The last of a tower's blocks has the rate times this factor, each block below it the factor once more, and what is
    before the blocks (embeddings of patches, tokens and positions) once more again. What is behind them has the rate
    of the tower.
    """

    image: float = Field(default=1.0, gt=0, le=1, description="of the image tower; 1: none")
    text: float = Field(default=1.0, gt=0, le=1, description="of the text tower; 1: none")
