"""The terms and providers that recipes know by name."""

from vlm.objectives.term import Provider, Term
from vlm.registry import Registry

TERMS: Registry[type[Term]] = Registry("objective", Term)
PROVIDERS: Registry[type[Provider]] = Registry("provider", Provider)
