"""Terms: one file each, with the helpers that it alone has beside it."""
