"""The commands that train, evaluate or convert a model: one module per command, and shared code."""
