"""Fitting the heads of paired zero experts."""
