"""Providers of extra negatives and harder positives, and the two shapes that extra negatives have."""
