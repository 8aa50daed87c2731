"""How a process of a run ends: in one line, told on every rank, whatever ends it."""
