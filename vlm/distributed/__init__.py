"""The ranks that work together, and how rows travel between them."""
