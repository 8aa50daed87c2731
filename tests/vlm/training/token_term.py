"""A local term of one's own: a mean over tokens that reads a teacher's, learns a vector, and counts what it saw."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.batch import Batch
from vlm.objectives.local_part import LocalPart
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.term import LocalTerm, Needs
from vlm.outputs import PAIR


class TokenTerm(LocalTerm):
    """mean over tokens e of (<w, e> - 1)^2 + |e - e'|^2, with e' the teacher's and w learned."""

    def needs(self) -> Needs:
        tokens = frozenset({"text_tokens", "text"})
        return Needs(outputs=PAIR | tokens, teacher_outputs=tokens)

    def start(self, facts: RunFacts) -> TermState:
        return SeenTokens(facts)

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:
        return {"vector": torch.linspace(-1, 1, facts.dim)}

    def count(self, batch: Batch) -> int:
        return int(batch.texts.lengths.sum())

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        tokens, taught = part.outputs["text_tokens"], part.teacher["text_tokens"]
        is_token = torch.arange(tokens.shape[1]) < part.batch.texts.lengths[:, None]
        assert isinstance(part.state, SeenTokens)
        part.state.add(is_token.sum())
        losses = (tokens @ part.parameters["vector"].to(tokens) - 1).square() + (tokens - taught).square().sum(2)
        return losses[is_token].sum()


class SeenTokens(TermState):
    """How many tokens all steps had: additive over micro-batches and ranks."""

    def __init__(self, facts: RunFacts) -> None:
        self._world = facts.world
        self.total = torch.zeros(1, dtype=torch.int64)
        self._proposed = torch.zeros(1, dtype=torch.int64)

    def add(self, count: Tensor) -> None:
        self._proposed = self._proposed + count

    def commit(self) -> None:
        self.total += self._world.sum(self._proposed)
        self.discard()

    def discard(self) -> None:
        self._proposed = torch.zeros(1, dtype=torch.int64)

    def proposal_check(self) -> None:
        return None

    def replicated(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def restore(self, replicated: dict[str, Tensor], local: list[dict[str, Tensor]]) -> None:
        self.total = replicated["total"]
