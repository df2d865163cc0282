"""Runs side by side: accuracy with its uncertainty, what was saved, and what to choose."""
