"""The hooks of a run: each is called after every step, in a fixed order, beside training."""
