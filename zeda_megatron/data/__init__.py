"""Prompts, rollouts, tokenizers, packing."""
