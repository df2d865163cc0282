"""HF and Megatron checkpoints: streaming files, conversion, training state."""
