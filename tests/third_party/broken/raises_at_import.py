"""A plugin whose engine is not installed."""

raise ImportError("the library of the engine is missing")
