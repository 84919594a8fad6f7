"""A model before it is served: hub, GGUF, conversion, the embedded default."""
