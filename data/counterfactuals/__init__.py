"""Captions that are almost right: the editors that make them from captions, and where they are found in a recipe."""
