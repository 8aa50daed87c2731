"""The objective of a run: a weighted sum of terms, the providers attached to them, and what both remember."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.batch import Batch, BatchPart
from vlm.distributed.world import World
from vlm.errors import EveryRankError, nearest
from vlm.objectives.local_part import LocalPart
from vlm.objectives.pairs import ExtraNegatives, Pairs
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.step import PairStep, StepRows
from vlm.objectives.term import LocalTerm, Needs, PairTerm, Provider, Term, needs_of
from vlm.outputs import PAIR, Outputs, is_shared, term_parameters
from vlm.similarity.exchange import Exchange

Loss = Float[Tensor, ""]
_REMEDIES = {
    "captions": "set data.caption to `all`",
    "documents": "set data.documents",
    "counterfactuals": "set data.counterfactuals",
    "degraded": "set data.degraded",
}


class _Provided(NamedTuple):
    negatives: ExtraNegatives | None
    positive_spread: Tensor | None


class Objective:
    """A weighted sum of terms. One of weight 0 is left out: it is not computed, and needs nothing.

    `needs` are those of all terms and providers; `pair_needs` those of pair terms and providers alone, with images and
    texts where any term has them embedded: these are looked at after a step.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        providers: Mapping[str, Provider] | None = None,
        exchange: Exchange | None = None,
        facts: RunFacts | None = None,
    ) -> None:
        self.terms = {name: term for name, term in terms.items() if term.weight}
        self.pair_terms = {name: term for name, term in self.terms.items() if isinstance(term, PairTerm)}
        self.local_terms = {name: term for name, term in self.terms.items() if isinstance(term, LocalTerm)}
        brought = {f"{name}/{own}": one for name, term in self.terms.items() for own, one in term.provides().items()}
        self.providers = {**(providers or {}), **brought}
        self.exchange = exchange or Exchange(World())
        self.facts = facts or RunFacts(0, 0, 1, 1, 0, self.exchange.world)
        self._attached = {name: self._providers_of(name, term) for name, term in self.pair_terms.items()}
        self.states: dict[str, TermState] = {}
        configs: dict[str, Term | Provider] = {**self.terms, **self.providers}
        for name, config in configs.items():
            state = config.start(self.facts)
            if state is not None:
                self.states[name] = state
        comparing: list[PairTerm | Provider] = [*self.pair_terms.values(), *self.providers.values()]
        compared = frozenset(kind for config in comparing for kind in config.between)
        pair_needs = needs_of(comparing) | Needs(outputs=compared)
        self.needs: Needs = pair_needs | needs_of(self.local_terms.values())
        self.pair_needs: Needs = replace(pair_needs, outputs=pair_needs.outputs | (self.needs.outputs & PAIR))

    @property
    def parts(self) -> dict[str, Term | Provider]:
        """Terms and providers by where they stand in a recipe."""
        brought = {f"{name}/{own}" for name, term in self.terms.items() for own in term.provides()}
        return {
            **{f"objective.{name}": term for name, term in self.terms.items()},
            **{f"providers.{name}": one for name, one in self.providers.items() if name not in brought},
        }

    def parameters(self) -> dict[str, Tensor]:
        """First values of what terms learn beside the model, as `term/name`."""
        return {
            f"{name}/{parameter}": value
            for name, term in self.terms.items()
            for parameter, value in term.parameters(self.facts).items()
        }

    def prepared(self, batch: Batch) -> Batch:
        """This rank's part of a global batch with what the local terms add to it for the model."""
        added: dict[str, BatchPart] = {}
        for term in self.local_terms.values():
            added |= term.adds(batch, self.facts.seed)
        return replace(batch, parts={**batch.parts, **added}) if added else batch

    def count(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The units of each local term in the global batch; `batch` is this rank's part of it. Collective.

        They stay on the device, in float64: nobody waits for them.
        """
        self._require_parts(batch)
        if not self.local_terms:
            return {}
        world = self.exchange.world
        local = [term.count(batch) for term in self.local_terms.values()]
        counts = world.sum(torch.tensor(local, dtype=torch.float64, device=world.device))
        return dict(zip(self.local_terms, counts, strict=True))

    def evaluate(
        self, outputs: Outputs, batch: Batch, *, teacher: Outputs | None = None
    ) -> tuple[Loss, dict[str, Loss]]:
        """This rank's part of the weighted sum, and of each term by name (detached), in one graph. Collective."""
        counts = self.count(batch)
        total, by_term = self.evaluate_pairs(outputs, batch, teacher=teacher)
        local, by_local_term = self.evaluate_local(outputs, batch, counts, teacher=teacher)
        return total + local, by_term | by_local_term

    def evaluate_pairs(
        self, outputs: Outputs, batch: Batch, *, teacher: Outputs | None = None
    ) -> tuple[Loss, dict[str, Loss]]:
        """The same of the terms that compare pairs, on all of this rank's rows. Collective."""
        total, by_term = outputs["logit_scale"].new_zeros(()), dict[str, Loss]()
        if not self.pair_terms:
            return total, by_term
        self._require_outputs(outputs)
        rows = StepRows(outputs, batch, self.exchange, self.pair_needs.gathered)

        def step_of(name: str, pairs: Pairs) -> PairStep:
            state, parameters = self.states.get(name), term_parameters(outputs, name)
            seed = self.facts.seed
            return PairStep(batch, outputs, rows, pairs, self.exchange, seed, teacher or {}, state, parameters)

        provided = self._provide(batch.step, rows, step_of)
        for name, term in self.pair_terms.items():
            value = term(step_of(name, self._with_provided(name, rows.pairs(term.between), provided)))
            total = total + term.weight * value
            by_term[name] = value.detach()
        return self._checked(total, [*self.pair_terms, *self.providers]), by_term

    def evaluate_local(
        self, outputs: Outputs, batch: Batch, counts: Mapping[str, Float[Tensor, ""]], *, teacher: Outputs | None = None
    ) -> tuple[Loss, dict[str, Loss]]:
        """The same of the local terms, on one micro-batch of a step with so many units in all (`count`)."""
        total, by_term = outputs["logit_scale"].new_zeros(()), dict[str, Loss]()
        if not self.local_terms:
            return total, by_term
        local_outputs = {name: value.detach() if is_shared(name) else value for name, value in outputs.items()}
        part = LocalPart(local_outputs, batch, self.facts.seed, teacher or {})
        for name, term in self.local_terms.items():
            parameters = term_parameters(outputs, name)
            value = term(replace(part, state=self.states.get(name), parameters=parameters))
            value = value * (self.exchange.world.size / counts[name].clamp(min=1)).to(value.dtype)
            total = total + term.weight * value
            by_term[name] = value.detach()
        return self._checked(total, list(self.local_terms)), by_term

    def commit(self) -> None:
        """Make what the last evaluation proposed last, once a step. Collective."""
        for state in self.states.values():
            state.commit()

    def discard(self) -> None:
        """Drop what the last evaluation proposed: the step is left out."""
        for state in self.states.values():
            state.discard()

    def _require_parts(self, batch: Batch) -> None:
        for where, config in self.parts.items():
            for missing in sorted(config.needs().batch_parts - batch.parts.keys()):
                remedy = _REMEDIES.get(missing)
                raise EveryRankError(f"{where}: the batch brings no {missing}{f'; {remedy}' if remedy else ''}")

    def _require_outputs(self, outputs: Outputs) -> None:
        places = {
            **{f"objective.{name}": term.between for name, term in self.pair_terms.items()},
            **{f"providers.{name}": provider.between for name, provider in self.providers.items()},
        }
        made = [name for name, output in outputs.items() if not is_shared(name) and output.ndim == 2]
        for where, between in places.items():
            for kind in between:
                if kind not in made:
                    raise EveryRankError(f"{where}.between: model and data make no {kind!r}; {nearest(kind, made)}")

    def _checked(self, total: Loss, names: list[str]) -> Loss:
        """The sum itself, or NaN where one of these terms or providers proposes to remember what is no number."""
        for name in names:
            check = self.states[name].proposal_check() if name in self.states else None
            if check is not None:
                total = total + check.to(total)
        return total

    def _provide(self, step: int, rows: StepRows, step_of: Callable[[str, Pairs], PairStep]) -> dict[str, "_Provided"]:
        provided = {}
        for name, provider in self.providers.items():
            if step >= provider.start_step and any(name in attached for attached in self._attached.values()):
                pair_step = step_of(name, rows.pairs(provider.between))
                provided[name] = _Provided(provider.negatives(pair_step), provider.positive_spread(pair_step))
        return provided

    def _with_provided(self, name: str, pairs: Pairs, provided: Mapping[str, "_Provided"]) -> Pairs:
        """A term's pairs with what the providers attached to it add."""
        attached = [provided[provider] for provider in self._attached[name] if provider in provided]
        spreads = [one.positive_spread for one in attached if one.positive_spread is not None]
        extra = tuple(one.negatives for one in attached if one.negatives is not None)
        return replace(pairs, extra=extra, positive_spread=spreads[0] if spreads else None)

    def _providers_of(self, name: str, term: PairTerm) -> tuple[str, ...]:
        """The providers attached to a term. Raises EveryRankError where one is attached to what cannot use it."""
        attached = []
        for provider_name, provider in self.providers.items():
            where = f"providers.{provider_name}.attach_to"
            for target in provider.attach_to or ():
                if target not in self.terms:
                    raise EveryRankError(f"{where}: no term {target!r}; {nearest(target, self.terms)}")
                if target not in self.pair_terms or not self.pair_terms[target].takes_providers:
                    raise EveryRankError(f"{where}: {target} takes no providers")
                if self.pair_terms[target].between != provider.between:
                    raise EveryRankError(f"{where}: {target} is not between {' and '.join(provider.between)}")
            everywhere = provider.attach_to is None and term.takes_providers and term.between == provider.between
            if everywhere or name in (provider.attach_to or ()):
                attached.append(provider_name)
        return tuple(attached)
