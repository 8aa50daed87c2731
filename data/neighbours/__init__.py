"""Clusters and groups of samples that are near each other by their embeddings, as batches of training take them."""
