"""The geometry of embeddings: two clouds on a sphere, how far apart and how wide, and which negatives count."""
