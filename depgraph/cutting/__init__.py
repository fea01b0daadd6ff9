"""Cutting a plan out of a model: in the module, or in its captured graph."""

from depgraph.cutting import recounting  # noqa: F401  (its rows stand in the table of `rewriting`)
