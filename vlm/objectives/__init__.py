"""Objectives: each term a small function of tensors and the ranks, chosen by name in a recipe."""
