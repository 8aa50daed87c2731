"""What a run does around its steps beside training: each hook is called after every step, in a fixed order."""
