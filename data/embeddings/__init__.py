"""Embeddings of the samples of shards by a model, a file of them beside each shard's name."""
