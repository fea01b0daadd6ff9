"""Cutting a plan out of a model: in the module, or in its captured graph."""

from depgraph.cutting import recounting, resizing  # noqa: F401  (their rows stand in the table of `rewriting`)
