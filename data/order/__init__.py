"""The order of samples: pure functions of integers, without I/O and without state."""
