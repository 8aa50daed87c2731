"""What would fail on this machine, this cluster and these shards, before a run finds out (`vlm doctor`)."""
