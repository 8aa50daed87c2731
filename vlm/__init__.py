"""The library: model, similarity, objectives and training of vision-language dual encoders."""

__version__ = "0.1.0"
