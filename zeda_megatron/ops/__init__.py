"""Operators, each with a plain PyTorch reference."""
