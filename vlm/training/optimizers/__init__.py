"""Optimizers of a run: what a kind of them is, those that ship, and the groups of parameters that they are given."""
