"""Asking a model all questions: engines, and a record that survives any interruption."""
