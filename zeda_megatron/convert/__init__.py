"""Hugging Face <-> Megatron, tensor by tensor: `hf_to_megatron`, `megatron_to_hf`, `verify`."""

from .hf_to_megatron import hf_to_megatron
from .megatron_to_hf import megatron_to_hf
from .verify import verify

__all__ = ["hf_to_megatron", "megatron_to_hf", "verify"]
