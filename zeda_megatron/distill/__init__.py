"""Frozen teacher, losses, stages 0, 1 and 2."""
