"""Depth: which blocks and branches of a model can be left out, by published methods and by a search of our own."""
