"""Baselines, metrics, FLOP accounting, report."""
