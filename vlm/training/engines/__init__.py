"""Engines: what runs forward, backward and step on one or many ranks, and how the ranks are joined for it."""
