"""Rows that stage 2 samples while it trains."""
