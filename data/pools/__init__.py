"""Work on many shards, shared among processes: of this machine, of a Ray cluster, or of a Slurm array."""
