"""Measuring trained models on all ranks: zero-shot classification, retrieval, and the report of a run."""
