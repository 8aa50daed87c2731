"""The similarity engine: what compares pairs across ranks."""
