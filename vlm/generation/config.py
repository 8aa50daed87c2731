"""How captions are generated: the way of choosing the next token, and how long they may get."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlm.config import Config

Method = Literal["greedy", "beam", "top_k", "top_p", "contrastive"]


class GenerationConfig(Config):
    """The generation of captions.

    greedy: the likeliest token. beam: the likeliest caption among so many that are followed at a time. top_k, top_p: a
    token drawn among the k likeliest, or the fewest that have a probability of p together (nucleus: Holtzman et al.,
    2020). contrastive: of the k likeliest the one with the largest (1 - alpha) p - alpha max cos, the cosine being that
    of its state with the states of all tokens before it (Su & Collier, 2023).
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "beams": ("method", ("beam",)),
        "length_penalty": ("method", ("beam",)),
        "k": ("method", ("top_k", "contrastive")),
        "p": ("method", ("top_p",)),
        "alpha": ("method", ("contrastive",)),
        "temperature": ("method", ("top_k", "top_p")),
        "seed": ("method", ("top_k", "top_p")),
    }

    method: Method = Field(default="greedy", description="how the next token is chosen")
    max_length: int | None = Field(
        default=None,
        gt=0,
        le=4096,
        description="tokens of a caption at most, its end among them; null: 32, or as many as the model's texts have",
    )
    min_length: int = Field(default=1, ge=0, le=4096, description="tokens before a caption may end")
    beams: int = Field(default=4, gt=0, le=1024, description="captions that are followed at a time; 1 is greedy")
    length_penalty: float = Field(
        default=0.0, ge=0, le=10, description="a caption's log-likelihood is divided by its length to this power"
    )
    k: int = Field(default=4, gt=0, le=4096, description="likeliest tokens to choose among")
    p: float = Field(default=0.9, gt=0, le=1, description="probability of the tokens to choose among")
    alpha: float = Field(default=0.6, ge=0, le=1, description="weight of the likeness to earlier tokens; 0 is greedy")
    temperature: float = Field(default=1.0, gt=0, le=100, description="by which logits are divided before a draw")
    seed: int = Field(default=0, ge=0, le=2**62, description="of the draws")

    @model_validator(mode="after")
    def _shorter_than_longest(self) -> "GenerationConfig":
        if self.max_length is not None and self.min_length >= self.max_length:
            raise ValueError(f"min_length: found {self.min_length}; it is below max_length ({self.max_length})")
        return self

    def meaningful(self) -> dict[str, Any]:
        """The options that change something with this method, as JSON holds them."""
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if name not in self.only_with or self.method in self.only_with[name][1]
        }
