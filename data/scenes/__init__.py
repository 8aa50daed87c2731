"""The embedded default data set: rendered scenes whose every object, place and number is known."""
