"""Triton kernels of the similarity engine, and the choice whether they run."""
