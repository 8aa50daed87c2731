"""Which sample comes when: pure functions of integers, without I/O and without state."""
