"""ZEDA on Megatron-Core: a static Mixture-of-Experts model becomes a dynamic one."""

__version__ = "0.1.0"
