"""Questions with one right text among texts that are almost right: out of files and shards, and answered by a model."""
