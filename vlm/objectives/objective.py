"""The objective of a run: a weighted sum of terms, the providers attached to them, and what both remember."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from vlm.batch import Batch
from vlm.encoded import Encoded
from vlm.errors import EveryRankError, nearest
from vlm.objectives.pairs import ExtraNegatives, Modality, Pairs, gather_pairs
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.term import Provider, Term
from vlm.similarity.exchange import Exchange
from vlm.world import World


class Objective:
    """Evaluates terms on a step's pairs. A term of weight 0 is not computed, and nobody's needs are its."""

    def __init__(
        self,
        terms: Mapping[str, Term],
        providers: Mapping[str, Provider] | None = None,
        exchange: Exchange | None = None,
        facts: RunFacts | None = None,
    ) -> None:
        self.terms = {name: term for name, term in terms.items() if term.weight}
        self.providers = dict(providers or {})
        self.exchange = exchange or Exchange(World())
        self.facts = facts or RunFacts(0, 0, 1, 1, 0, self.exchange.world)
        self._attached = {name: self._providers_of(name) for name in self.terms}
        parts: dict[str, Term | Provider] = {**self.terms, **self.providers}
        self.states: dict[str, TermState] = {}
        for name, part in parts.items():
            state = part.start(self.facts)
            if state is not None:
                self.states[name] = state
        self._gathers: frozenset[Modality] = frozenset().union(*(part.gathers for part in parts.values()))
        self.needs_teacher = any(part.needs_teacher for part in parts.values())
        self.needs_captions = any(term.needs_captions for term in self.terms.values())

    def parameters(self) -> dict[str, Tensor]:
        """First values of what terms learn beside the model, as `term/name`."""
        return {
            f"{name}/{own}": value
            for name, term in self.terms.items()
            for own, value in term.parameters(self.facts).items()
        }

    def evaluate(
        self,
        encoded: Encoded,
        batch: Batch,
        *,
        teacher: Encoded | None = None,
        pairwise: bool | None = None,
        num_pairs: int | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """This rank's share of the weighted sum, and of each term by name (detached). Collective.

        `pairwise` chooses the terms that compare pairs, or those that do not (None: all). Those that do not may be
        evaluated on a part of the rank's rows, with the `num_pairs` of the whole step.
        """
        chosen = {name: term for name, term in self.terms.items() if pairwise in (None, term.pairwise)}
        if not chosen:
            return encoded.image.new_zeros(()), {}
        pairs = gather_pairs(
            encoded,
            batch,
            self.exchange,
            needed=self._gathers,
            seed=self.facts.seed,
            teacher=teacher,
            num_pairs=num_pairs,
        )
        provided = self._provide(pairs) if any(term.takes_providers for term in chosen.values()) else {}
        total = encoded.image.new_zeros(())
        shares = {}
        for name, term in chosen.items():
            share = term(self._as_seen_by(name, pairs, provided))
            total = total + term.weight * share
            shares[name] = share.detach()
        for state in self.states.values():
            check = state.proposal_check()
            if check is not None:
                total = total + check.to(total)
        return total, shares

    def commit(self) -> None:
        """Make what the last evaluation proposed last, once a step. Collective."""
        for state in self.states.values():
            state.commit()

    def discard(self) -> None:
        """Drop what the last evaluation proposed: the step is left out."""
        for state in self.states.values():
            state.discard()

    def _provide(self, pairs: Pairs) -> dict[str, tuple[ExtraNegatives | None, Tensor | None]]:
        provided = {}
        for name, provider in self.providers.items():
            if pairs.batch.step >= provider.start_step:
                own = replace(pairs, state=self.states.get(name))
                provided[name] = (provider.negatives(own), provider.positive_spread(own))
        return provided

    def _as_seen_by(
        self, name: str, pairs: Pairs, provided: dict[str, tuple[ExtraNegatives | None, Tensor | None]]
    ) -> Pairs:
        here = [provided[provider] for provider in self._attached[name] if provider in provided]
        spreads = [spread for _, spread in here if spread is not None]
        prefix = f"{name}/"
        return replace(
            pairs,
            extra=tuple(extra for extra, _ in here if extra is not None),
            positive_spread=spreads[0] if spreads else None,
            state=self.states.get(name),
            parameters={
                key.removeprefix(prefix): value
                for key, value in pairs.encoded.parameters.items()
                if key.startswith(prefix)
            },
        )

    def _providers_of(self, name: str) -> tuple[str, ...]:
        """The providers attached to a term. Raises EveryRankError where one is attached to what cannot use it."""
        attached = []
        for provider_name, provider in self.providers.items():
            for target in provider.attach_to or ():
                if target not in self.terms:
                    raise EveryRankError(
                        f"providers.{provider_name}.attach_to: no term {target!r}; {nearest(target, self.terms)}"
                    )
                if not self.terms[target].takes_providers:
                    raise EveryRankError(f"providers.{provider_name}.attach_to: {target} takes no providers")
            everywhere = provider.attach_to is None and self.terms[name].takes_providers
            if everywhere or name in (provider.attach_to or ()):
                attached.append(provider_name)
        return tuple(attached)
