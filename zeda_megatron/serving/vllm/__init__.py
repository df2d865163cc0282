"""vLLM plugin for models with zero experts. Importing this package imports neither vLLM nor torch."""
