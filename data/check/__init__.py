"""Contents of a set of shards: counts, distributions, duplicates, and everything that training could not use."""
