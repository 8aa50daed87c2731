"""Dual encoders: towers, their tokenizer and image specification, weights in and out."""
