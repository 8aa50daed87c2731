"""Loading of training and held-out batches: from shards and their order to tensors of one rank."""
