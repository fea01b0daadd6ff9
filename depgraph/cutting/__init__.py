"""Cutting a plan out of a model: in the module, or in its captured graph."""
