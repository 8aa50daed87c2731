"""Captions of other samples that are almost right, or mean the same: mined by embedding and by surface (DebCSE)."""
