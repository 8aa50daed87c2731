"""Shards: their names, members, index, and where their bytes come from."""
