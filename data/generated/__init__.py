"""Captions that a model generated, written back into shards beside those that people wrote."""
