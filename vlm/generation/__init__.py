"""Captions out of a model: what a decoder remembers from token to token, and the ways of choosing the next one."""
